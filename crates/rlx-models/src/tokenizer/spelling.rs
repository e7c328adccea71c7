//! How the pieces of a vocabulary spell bytes.

use tokenizers::DecoderWrapper;

/// A way to spell bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spelling {
    /// A character for each byte, as in GPT-2.
    ByteLevel,
    /// Text with U+2581 for a space, and `<0x0A>` for bytes that are no piece.
    SentencePiece,
}

/// The spelling that a decoder undoes.
pub(super) fn of(decoder: &DecoderWrapper) -> Option<Spelling> {
    match decoder {
        DecoderWrapper::ByteLevel(_) => Some(Spelling::ByteLevel),
        DecoderWrapper::ByteFallback(_) | DecoderWrapper::Metaspace(_) => Some(Spelling::SentencePiece),
        DecoderWrapper::Sequence(steps) => steps.get_decoders().iter().find_map(of),
        _ => None,
    }
}

impl Spelling {
    pub fn bytes(self, piece: &str) -> Vec<u8> {
        match self {
            Spelling::ByteLevel => piece.chars().filter_map(byte_of).collect(),
            Spelling::SentencePiece => match byte_piece(piece) {
                Some(byte) => vec![byte],
                None => piece.replace('\u{2581}', " ").into_bytes(),
            },
        }
    }
}

/// Bytes that GPT-2 spells as themselves; the others follow from U+0100 on, in order.
fn is_plain(byte: u8) -> bool {
    matches!(byte, 33..=126 | 161..=172 | 174..=255)
}

fn byte_of(character: char) -> Option<u8> {
    let code = u32::from(character);
    match u8::try_from(code) {
        Ok(byte) => is_plain(byte).then_some(byte),
        Err(_) => (0..=u8::MAX).filter(|&byte| !is_plain(byte)).nth(usize::try_from(code - 256).ok()?),
    }
}

fn byte_piece(piece: &str) -> Option<u8> {
    let digits = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_one_character() {
        let spelled: Vec<u8> = (0..0x200).filter_map(char::from_u32).filter_map(byte_of).collect();
        let mut sorted = spelled.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..=u8::MAX).collect::<Vec<_>>());
        assert_eq!(
            (byte_of('\u{120}'), byte_of('\u{10a}'), byte_of('a')),
            (Some(b' '), Some(b'\n'), Some(b'a'))
        );
    }

    #[test]
    fn pieces_are_text_or_one_byte() {
        let bytes = |piece| Spelling::SentencePiece.bytes(piece);
        assert_eq!(
            (bytes("\u{2581}a"), bytes("<0x0A>"), bytes("<0x0>")),
            (b" a".to_vec(), vec![10], b"<0x0>".to_vec())
        );
        assert_eq!(Spelling::ByteLevel.bytes("\u{120}\u{c3}\u{a9}"), " é".as_bytes());
    }
}
