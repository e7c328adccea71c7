use super::*;

fn stamp() -> Stamp {
    Stamp {
        kind: "packed".into(),
        version: "1".into(),
        device: "cpu".into(),
        isa: "avx2".into(),
        precision: "f32".into(),
        packing: [7; 32],
    }
}

/// Two small sections and three large ones, of which one spans chunks and one is empty.
fn write(path: &Path) -> Vec<u8> {
    let long: Vec<u8> = (0..CHUNK_BYTES + 5000).map(|at| (at * 31 % 251) as u8).collect();
    let small = [
        Section { name: "plan", about: b"", bytes: b"some plan" },
        Section { name: "none", about: b"", bytes: b"" },
    ];
    let large = [
        Section { name: "a", about: b"x", bytes: &long },
        Section { name: "b", about: b"", bytes: b"" },
        Section { name: "c", about: b"", bytes: b"short" },
    ];
    Container { stamp: &stamp(), key: b"the key", small: &small, large: &large }.write(path, 2).unwrap();
    long
}

#[test]
fn what_is_written_is_read_back_from_page_starts() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    let long = write(&path);
    let opened = OpenContainer::open(&path).unwrap();
    opened.expect(&stamp()).unwrap();
    opened.verify_body(3).unwrap();
    assert_eq!(opened.key(), b"the key");
    assert_eq!(opened.small("plan"), Some(&b"some plan"[..]));
    assert_eq!(opened.small("none"), Some(&b""[..]));
    assert_eq!(opened.small("other"), None);
    let large = opened.large().unwrap();
    let names: Vec<_> = large.iter().map(|section| (section.name, section.about)).collect();
    assert_eq!(names, [("a", &b"x"[..]), ("b", b""), ("c", b"")]);
    assert!(large.iter().all(|section| section.content.offset().is_multiple_of(PAGE_BYTES as usize)));
    assert_eq!(large[0].content.bytes(), long);
    assert_eq!(large[2].content.bytes(), b"short");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no unfinished file is left");
}

#[test]
fn a_file_cut_at_any_length_of_its_head_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    write(&path);
    let whole = fs::read(&path).unwrap();
    let body = OpenContainer::open(&path).unwrap().opened_bytes() as usize;
    for len in (0..=body + 3).chain([whole.len() - 1]) {
        fs::write(&path, &whole[..len]).unwrap();
        assert!(OpenContainer::open(&path).is_err(), "cut to {len} bytes");
    }
    fs::write(&path, [&whole[..], b"x"].concat()).unwrap();
    assert!(OpenContainer::open(&path).is_err(), "a byte too long");
}

#[test]
fn every_flipped_byte_before_the_body_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    write(&path);
    let whole = fs::read(&path).unwrap();
    let body = OpenContainer::open(&path).unwrap().opened_bytes() as usize;
    for at in 0..body {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        fs::write(&path, &bytes).unwrap();
        assert!(OpenContainer::open(&path).is_err(), "byte {at}");
    }
}

#[test]
fn a_flip_in_the_body_is_found_where_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    write(&path);
    let mut bytes = fs::read(&path).unwrap();
    let body = OpenContainer::open(&path).unwrap().opened_bytes() as usize;
    bytes[body + CHUNK_BYTES + 1] ^= 4;
    fs::write(&path, &bytes).unwrap();
    let error = OpenContainer::open(&path).unwrap().verify_body(2).unwrap_err().to_string();
    assert!(error.contains(&format!("from byte {}", body + CHUNK_BYTES)), "{error}");
}

#[test]
fn another_stamp_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    write(&path);
    let opened = OpenContainer::open(&path).unwrap();
    type Change<'c> = &'c dyn Fn(&mut Stamp);
    let changed: [(&str, Change<'_>); 5] = [
        ("version", &|stamp| stamp.version = "2".into()),
        ("device", &|stamp| stamp.device = "gpu".into()),
        ("instruction set", &|stamp| stamp.isa = "avx512".into()),
        ("precision", &|stamp| stamp.precision = "bf16".into()),
        ("the packing", &|stamp| stamp.packing = [8; 32]),
    ];
    for (name, change) in changed {
        let mut expected = stamp();
        change(&mut expected);
        let error = opened.expect(&expected).unwrap_err();
        assert!(matches!(error, AotCacheError::Mismatch { what, .. } if what == name), "{error}");
    }
    let mut bytes = fs::read(&path).unwrap();
    bytes[MAGIC.len()] = 2;
    fs::write(&path, bytes).unwrap();
    assert!(matches!(OpenContainer::open(&path), Err(AotCacheError::Mismatch { what: "format", .. })));
}

/// A file with this header and whatever follows, under a right digest: what a forger can write.
fn sealed(header: &[u8], rest: &[u8]) -> Vec<u8> {
    let mut file =
        [&MAGIC[..], &FORMAT.to_le_bytes(), &[0; 4], &(header.len() as u64).to_le_bytes()].concat();
    file.extend_from_slice(&[0; 32]);
    file.extend_from_slice(header);
    let digest = *blake3::hash(&file).as_bytes();
    file[DIGEST_AT..FIXED_BYTES].copy_from_slice(&digest);
    file.extend_from_slice(rest);
    file
}

#[test]
fn a_forged_header_is_refused_or_stays_within_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    write(&path);
    let whole = fs::read(&path).unwrap();
    let len = u64::from_le_bytes(whole[16..24].try_into().unwrap()) as usize;
    let (header, rest) = (&whole[FIXED_BYTES..FIXED_BYTES + len], &whole[FIXED_BYTES + len..]);
    fs::write(&path, sealed(header, rest)).unwrap();
    OpenContainer::open(&path).unwrap().verify_body(1).unwrap();
    let mut seed = 5u64;
    let mut random = |below: usize| {
        seed = seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (seed >> 33) as usize % below
    };
    for round in 0..1500 {
        let mut forged = header.to_vec();
        for _ in 0..1 + random(3) {
            let at = random(forged.len());
            forged[at] = [0, 1, 0x7f, 0x80, 0xff, forged[at] ^ 1 << random(8)][random(6)];
        }
        if random(4) == 0 {
            forged.truncate(random(len));
        }
        fs::write(&path, sealed(&forged, rest)).unwrap();
        if let Ok(opened) = OpenContainer::open(&path) {
            let file_bytes = opened.file_bytes() as usize;
            for section in opened.large().unwrap() {
                let range = section.content;
                assert!(range.offset() + range.len() <= file_bytes, "round {round}");
            }
            drop(opened.verify_body(1));
        }
    }
}
