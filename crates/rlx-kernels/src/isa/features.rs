use std::sync::OnceLock;

/// Sizes of one core's data caches in bytes; 0 where unknown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheSizes {
    /// Level 1 data.
    pub l1_bytes: usize,
    /// Level 2.
    pub l2_bytes: usize,
    /// Level 3, as shared.
    pub l3_bytes: usize,
}

/// What the processor and the operating system offer to kernels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuFeatures {
    /// AVX2.
    pub avx2: bool,
    /// Fused multiply-add on 256 bits.
    pub fma: bool,
    /// Conversions between f16 and f32.
    pub f16c: bool,
    /// AVX-VNNI on 256 bits.
    pub avx_vnni: bool,
    /// AVX-512 F, BW, CD, DQ and VL together.
    pub avx512: bool,
    /// `vpdpbusd` on 512 bits.
    pub avx512_vnni: bool,
    /// `vdpbf16ps`.
    pub avx512_bf16: bool,
    /// `vdpbf16ps` does more in a cycle than fused multiply-adds: so on AMD's cores. On Intel's it takes the place of four
    /// fused multiply-adds and does the work of two.
    pub avx512_bf16_fast: bool,
    /// f16 arithmetic on 512 bits.
    pub avx512_fp16: bool,
    /// AMX tiles are present in the processor (a process must still ask the system for them).
    pub amx_tile: bool,
    /// AMX bf16 products.
    pub amx_bf16: bool,
    /// AMX int8 products.
    pub amx_int8: bool,
    /// WebAssembly vectors.
    pub simd128: bool,
    /// AArch64 vectors.
    pub neon: bool,
    /// AArch64 int8 dot products.
    pub neon_dotprod: bool,
    /// AArch64 f16 arithmetic.
    pub neon_fp16: bool,
    /// AArch64 bf16 products.
    pub neon_bf16: bool,
    /// AArch64 int8 matrix products.
    pub neon_i8mm: bool,
    /// Cache sizes of one core.
    pub caches: CacheSizes,
}

impl CpuFeatures {
    /// The features of this machine, read once.
    pub fn detect() -> &'static CpuFeatures {
        static DETECTED: OnceLock<CpuFeatures> = OnceLock::new();
        DETECTED.get_or_init(read)
    }
}

#[cfg(target_arch = "x86_64")]
fn read() -> CpuFeatures {
    use std::arch::is_x86_feature_detected as has;
    use std::arch::x86_64::{__cpuid, __cpuid_count};

    let first = __cpuid(0);
    let max_leaf = first.eax;
    let amd = [first.ebx, first.edx, first.ecx].map(u32::to_le_bytes).concat() == b"AuthenticAMD";
    let leaf7_edx = if max_leaf >= 7 { __cpuid_count(7, 0).edx } else { 0 };
    CpuFeatures {
        avx2: has!("avx2"),
        fma: has!("fma"),
        f16c: has!("f16c"),
        avx_vnni: has!("avxvnni"),
        avx512: has!("avx512f")
            && has!("avx512bw")
            && has!("avx512cd")
            && has!("avx512dq")
            && has!("avx512vl"),
        avx512_vnni: has!("avx512vnni"),
        avx512_bf16: has!("avx512bf16"),
        avx512_bf16_fast: has!("avx512bf16") && amd,
        avx512_fp16: has!("avx512fp16"),
        amx_bf16: leaf7_edx & (1 << 22) != 0,
        amx_tile: leaf7_edx & (1 << 24) != 0,
        amx_int8: leaf7_edx & (1 << 25) != 0,
        caches: read_caches(max_leaf),
        ..CpuFeatures::default()
    }
}

#[cfg(target_arch = "x86_64")]
fn read_caches(max_leaf: u32) -> CacheSizes {
    use std::arch::x86_64::{__cpuid, __cpuid_count};

    const AMD_CACHES: u32 = 0x8000_001d;
    let leaf = if __cpuid(0x8000_0000).eax >= AMD_CACHES && __cpuid_count(AMD_CACHES, 0).eax & 31 != 0 {
        AMD_CACHES
    } else {
        4
    };
    let mut caches = CacheSizes::default();
    if leaf == 4 && max_leaf < 4 {
        return caches;
    }
    for index in 0..16 {
        let r = __cpuid_count(leaf, index);
        let kind = r.eax & 31;
        if kind == 0 {
            break;
        }
        let ways = (r.ebx >> 22) as usize + 1;
        let partitions = ((r.ebx >> 12) & 0x3ff) as usize + 1;
        let line = (r.ebx & 0xfff) as usize + 1;
        let bytes = ways * partitions * line * (r.ecx as usize + 1);
        match ((r.eax >> 5) & 7, kind) {
            (1, 1) => caches.l1_bytes = bytes,
            (2, _) => caches.l2_bytes = bytes,
            (3, _) => caches.l3_bytes = bytes,
            _ => {}
        }
    }
    caches
}

#[cfg(target_arch = "aarch64")]
fn read() -> CpuFeatures {
    use std::arch::is_aarch64_feature_detected as has;
    CpuFeatures {
        neon: has!("neon"),
        neon_dotprod: has!("dotprod"),
        neon_fp16: has!("fp16"),
        neon_bf16: has!("bf16"),
        neon_i8mm: has!("i8mm"),
        ..CpuFeatures::default()
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn read() -> CpuFeatures {
    let simd128 = cfg!(all(target_arch = "wasm32", target_feature = "simd128"));
    CpuFeatures { simd128, ..CpuFeatures::default() }
}
