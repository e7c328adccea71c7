//! Packed matrices of the CPU in files.

use super::CpuBackend;
use crate::aot::wire::{WireReader, WireWriter};
use crate::backend::PackedStorage;
use crate::import::gguf::{TENSOR_TYPES, tensor_type_code};
use crate::weights::Packed;
use rlx_kernels::gemm::{PackedLayout, PackedMatrix, WeightOrder, WeightPart, WeightType, pack};
use rlx_kernels::quant_dot;
use rlx_tensor::storage::mapped::MappedRange;
use std::sync::Arc;

/// A layout's first field: what the rest describes.
const PANELS: u8 = 1;

const TYPES: [(u8, WeightType); 3] = [(0, WeightType::F32), (1, WeightType::Bf16), (2, WeightType::F16)];

/// Codes of block types are their numbers in GGUF files after this.
const BLOCKS: u8 = 64;

fn code_of(dtype: WeightType) -> Option<u8> {
    match dtype {
        WeightType::Blocks(blocks) => BLOCKS.checked_add(u8::try_from(tensor_type_code(blocks)?).ok()?),
        plain => TYPES.into_iter().find(|(_, known)| *known == plain).map(|(code, _)| code),
    }
}

fn type_of(code: u8) -> Option<WeightType> {
    if let Some(number) = code.checked_sub(BLOCKS) {
        let (_, dtype) = TENSOR_TYPES.iter().find(|(known, _)| *known == u32::from(number))?;
        return quant_dot::dtypes().any(|known| known == *dtype).then_some(WeightType::Blocks(*dtype));
    }
    TYPES.into_iter().find(|(known, _)| *known == code).map(|(_, dtype)| dtype)
}

struct Mapped(MappedRange);

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        self.0.bytes()
    }
}

impl PackedStorage for CpuBackend {
    fn isa(&self) -> String {
        self.isa.to_string()
    }

    fn precision(&self) -> &'static str {
        self.precision.name()
    }

    fn packing(&self) -> [u8; 32] {
        let mut digest = blake3::Hasher::new();
        // Odd sizes, so that padding is in it.
        let (n, k) = (70, 5);
        for (_, dtype) in TYPES {
            for gated in [false, true] {
                let bytes: Vec<u8> = (0..n * k * dtype.bytes()).map(|at| (at * 7 + 1) as u8).collect();
                let part = WeightPart { bytes: &bytes, dtype, n, k, order: WeightOrder::RowMajor };
                let parts = [part, part];
                let parts = if gated { &parts[..] } else { &parts[..1] };
                if let Ok(matrix) = pack(parts, gated, self.isa, self.precision) {
                    digest.update(matrix.bytes());
                }
            }
        }
        // A superblock of any type, and odd columns.
        let (n, k) = (35, 256);
        for dtype in quant_dot::dtypes().map(WeightType::Blocks) {
            let Some(len) = dtype.source_bytes(n, k) else { continue };
            let bytes: Vec<u8> = (0..len).map(|at| (at * 7 + 1) as u8).collect();
            let part = WeightPart { bytes: &bytes, dtype, n, k, order: WeightOrder::RowMajor };
            if let Ok(matrix) = pack(&[part], false, self.isa, self.precision) {
                digest.update(matrix.bytes());
            }
        }
        *digest.finalize().as_bytes()
    }

    fn store<'p>(&self, packed: &'p Packed) -> Option<(Vec<u8>, &'p [u8])> {
        let matrix = packed.downcast_ref::<PackedMatrix>()?;
        let layout = matrix.layout();
        let code = code_of(layout.dtype())?;
        let mut out = WireWriter::new();
        out.u8(PANELS).u8(code).u8(u8::from(layout.gated())).u64(layout.n() as u64).u64(layout.k() as u64);
        Some((out.finish(), matrix.bytes()))
    }

    fn restore(&self, layout: &[u8], content: MappedRange) -> Result<Packed, String> {
        let mut from = WireReader::new(layout);
        let mut fields = || -> Result<_, crate::aot::wire::WireError> {
            let fields = (from.u8()?, from.u8()?, from.u8()?, from.size()?, from.size()?);
            from.end().map(|()| fields)
        };
        let (kind, code, gated, n, k) = fields().map_err(|error| format!("the layout, {error}"))?;
        let dtype = type_of(code).filter(|_| kind == PANELS && gated <= 1);
        let dtype = dtype.ok_or("the layout is of an unknown kind")?;
        let layout = PackedLayout::new(dtype, n, k, gated == 1, self.isa).map_err(|e| e.to_string())?;
        if layout.bytes() != content.len() {
            return Err(format!("the layout takes {} bytes, found {}", layout.bytes(), content.len()));
        }
        let (bytes, file) = (content.len() as u64, Arc::clone(content.file()));
        let matrix = PackedMatrix::from_storage(layout, Arc::new(Mapped(content)), 0);
        Ok(Packed::in_file(matrix.map_err(|e| e.to_string())?, bytes, file))
    }
}
