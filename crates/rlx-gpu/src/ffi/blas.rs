//! cuBLASLt, loaded when it is asked for: products on a queue of work.
#![expect(unsafe_code, reason = "the library is C: handles, and addresses on a card")]

use super::cuda::{Card, Fault, Queue, Words};
use crate::ir::Binding;
use crate::ir::gemm::{GemmCall, Matrix, Spot};
use cudarc::cublaslt::{result, sys};
use cudarc::driver::CudaContext;
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

/// What is called of the library. Every version that has been for ten years has all of it, but a file of its name need not be it.
const SYMBOLS: [&str; 15] = [
    "cublasLtCreate",
    "cublasLtDestroy",
    "cublasLtGetVersion",
    "cublasLtMatmul",
    "cublasLtMatmulAlgoGetHeuristic",
    "cublasLtMatmulDescCreate",
    "cublasLtMatmulDescDestroy",
    "cublasLtMatmulDescSetAttribute",
    "cublasLtMatmulPreferenceCreate",
    "cublasLtMatmulPreferenceDestroy",
    "cublasLtMatmulPreferenceSetAttribute",
    "cublasLtMatrixLayoutCreate",
    "cublasLtMatrixLayoutDestroy",
    "cublasLtMatrixLayoutSetAttribute",
    "cublasLtGetStatusString",
];

/// Why the library cannot be used on this machine, if it cannot.
pub(crate) fn missing() -> Option<String> {
    // SAFETY: loading runs the library's initialisers, which is what it is installed for.
    if !unsafe { sys::is_culib_present() } {
        return Some(
            "libcublasLt is not found; the CUDA toolkit and the package nvidia-cublas have it".to_owned(),
        );
    }
    // SAFETY: it can be loaded, as was just found; an address is looked up and not used.
    let has = |name: &&str| unsafe { sys::culib().get::<*const c_void>(name.as_bytes()) }.is_ok();
    let absent = SYMBOLS.iter().find(|name| !has(name))?;
    Some(format!("the libcublasLt that is found has no {absent}"))
}

impl From<result::CublasError> for Fault {
    fn from(error: result::CublasError) -> Self {
        use sys::cublasStatus_t as Status;
        let exhausted = error.0 == Status::CUBLAS_STATUS_ALLOC_FAILED;
        let refused = matches!(
            error.0,
            Status::CUBLAS_STATUS_NOT_SUPPORTED
                | Status::CUBLAS_STATUS_INVALID_VALUE
                | Status::CUBLAS_STATUS_ARCH_MISMATCH
        );
        Fault { exhausted, refused, cause: format!("{:?}", error.0) }
    }
}

/// The library with what it has chosen.
pub(crate) struct Blas {
    handle: sys::cublasLtHandle_t,
    context: Arc<CudaContext>,
    /// For each shape the algorithm that it named first: the same for all products of this shape.
    chosen: Mutex<HashMap<(GemmCall, [u32; 4]), sys::cublasLtMatmulAlgo_t>>,
}

// SAFETY: a handle may be used by several threads at once, as the library's manual says.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

impl Drop for Blas {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: made by `open`, destroyed here only.
            let _ = unsafe { result::destroy_handle(self.handle) };
        }
    }
}

/// A description that the library holds, destroyed when it goes.
struct Held<T: Copy>(T, unsafe fn(T) -> Result<(), result::CublasError>);

impl<T: Copy> Drop for Held<T> {
    fn drop(&mut self) {
        // SAFETY: made by the function that belongs to this one, destroyed here only.
        let _ = unsafe { (self.1)(self.0) };
    }
}

type Layout = Held<sys::cublasLtMatrixLayout_t>;
type Product = Held<sys::cublasLtMatmulDesc_t>;

/// A value as the library is handed attributes.
fn bytes<T>(value: &T) -> (*const c_void, usize) {
    (std::ptr::from_ref(value).cast(), size_of::<T>())
}

impl Product {
    fn set<T>(&self, attribute: sys::cublasLtMatmulDescAttributes_t, value: &T) -> Result<(), Fault> {
        let (at, size) = bytes(value);
        // SAFETY: the description lives, and the value has as many bytes as are told; the library copies it.
        Ok(unsafe { result::set_matmul_desc_attribute(self.0, attribute, at, size) }?)
    }
}

/// A matrix whose columns are a [`Matrix`]'s lines of so many elements; of a turned one its rows.
fn layout(
    of: &Matrix,
    element: sys::cudaDataType,
    lines: usize,
    along: usize,
    count: usize,
) -> Result<Layout, Fault> {
    let (rows, columns) = if of.turned { (lines, along) } else { (along, lines) };
    let made = result::create_matrix_layout(element, rows as u64, columns as u64, of.lead as i64)?;
    let layout: Layout = Held(made, result::destroy_matrix_layout);
    if count > 1 {
        use sys::cublasLtMatrixLayoutAttribute_t as Attribute;
        let (count, apart) = (i32::try_from(count).unwrap_or(i32::MAX), of.apart as i64);
        let pairs = [
            (Attribute::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, bytes(&count)),
            (Attribute::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, bytes(&apart)),
        ];
        for (attribute, (at, size)) in pairs {
            // SAFETY: the layout lives, and both values do until the call has copied them.
            unsafe { result::set_matrix_layout_attribute(layout.0, attribute, at, size) }?;
        }
    }
    Ok(layout)
}

/// A product as the library is told of it.
struct Described {
    product: Product,
    /// Of columns, rows, addend and result: the library's A, B, C and D.
    layouts: [Layout; 4],
}

impl Described {
    fn new(call: &GemmCall, bias: Option<u64>) -> Result<Self, Fault> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let float = sys::cudaDataType::CUDA_R_32F;
        let product = result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, float)?;
        let product: Product = Held(product, result::destroy_matmul_desc);
        // What the library calls `CUBLAS_OP_N` and `CUBLAS_OP_T`.
        let turn = |turned: bool| i32::from(turned);
        // The result's rows are columns to the library, and lines of `columns` its rows.
        product.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &turn(!call.columns.turned))?;
        product.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSB, &turn(call.rows.turned))?;
        if let Some(address) = bias {
            product.set(
                Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE,
                &sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS,
            )?;
            product.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &address)?;
        }
        let [m, n, k] = call.extents;
        let element = if call.pairs.is_some() { sys::cudaDataType::CUDA_R_16BF } else { float };
        let addend = call.addend.as_ref().unwrap_or(&call.result);
        let layouts = [
            layout(&call.columns, element, n, k, call.count)?,
            layout(&call.rows, element, m, k, call.count)?,
            layout(addend, float, m, n, call.count)?,
            layout(&call.result, float, m, n, call.count)?,
        ];
        Ok(Described { product, layouts })
    }
}

/// The largest power of two up to 256 that divides an address.
fn alignment(address: u64) -> u32 {
    1 << address.trailing_zeros().min(8)
}

impl Blas {
    /// The library for a card; see [`missing`] first.
    pub fn open(card: &Card) -> Result<Blas, Fault> {
        card.0.bind_to_thread()?;
        let handle = result::create_handle()?;
        Ok(Blas { handle, context: Arc::clone(&card.0), chosen: Mutex::default() })
    }

    /// As the library counts its versions.
    pub fn version(&self) -> usize {
        // SAFETY: the library is loaded, for a handle was made.
        unsafe { sys::cublasLtGetVersion() }
    }

    /// The algorithm for a shape of operands that are aligned so.
    fn algorithm(
        &self,
        call: &GemmCall,
        described: &Described,
        aligned: [u32; 4],
    ) -> Result<sys::cublasLtMatmulAlgo_t, Fault> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let lock = || self.chosen.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (call.shape(), aligned);
        if let Some(algorithm) = lock().get(&key) {
            return Ok(*algorithm);
        }
        let preference = Held(result::create_matmul_pref()?, result::destroy_matmul_pref);
        let room = call.workspace.1 * 4;
        // Parts of a sum that are summed apart are added up in one order, in 32 bits.
        let schemes = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        let [a, b, c, d] = &aligned;
        let attributes = [
            (Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, bytes(&room)),
            (Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, bytes(&schemes)),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, bytes(a)),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, bytes(b)),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, bytes(c)),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, bytes(d)),
        ];
        for (attribute, (at, size)) in attributes {
            // SAFETY: the preference lives, and all values do until the call has copied them.
            unsafe { result::set_matmul_pref_attribute(preference.0, attribute, at, size) }?;
        }
        let [a, b, c, d] = &described.layouts;
        let product = described.product.0;
        // SAFETY: all descriptions live until the end of this function.
        let found = unsafe {
            result::get_matmul_algo_heuristic(self.handle, product, a.0, b.0, c.0, d.0, preference.0)
        };
        let found = found.map_err(|error| {
            let (fault, [m, n, k]) = (Fault::from(error), call.extents);
            Fault { cause: format!("no algorithm for {m} x {n} x {k}: {}", fault.cause), ..fault }
        })?;
        lock().insert(key, found.algo);
        Ok(found.algo)
    }

    /// Puts a product on the queue. `arena` and `bound` are what its kernel would bind, weights first, of which there are so many.
    pub fn multiply(
        &self,
        queue: &Queue,
        call: &GemmCall,
        (arena, bound, weights): (&Words, &[&Words], usize),
    ) -> Result<(), Fault> {
        self.context.bind_to_thread()?;
        let address = |spot: Spot, count: usize| {
            let words = match spot.binding {
                Binding::Arena => Some(arena),
                Binding::Weight(at) => bound.get(at as usize).copied(),
                Binding::State(at) => bound.get(weights + at as usize).copied(),
            };
            let cause = || "a matrix is not bound".to_owned();
            let words = words.ok_or_else(|| Fault { exhausted: false, refused: true, cause: cause() })?;
            words.range(spot.word, count)
        };
        let bias = call.bias.map(|spot| address(spot, call.extents[1])).transpose()?;
        let described = Described::new(call, bias)?;
        let result = address(call.result.spot, 0)?;
        let places = [
            address(call.columns.spot, 0)?,
            address(call.rows.spot, 0)?,
            call.addend.map_or(Ok(result), |of| address(of.spot, 0))?,
            result,
        ];
        let (room, words) = call.workspace;
        let room = address(room, words)?;
        let algorithm = self.algorithm(call, &described, places.map(alignment))?;
        let (alpha, beta) = (1.0f32, if call.addend.is_some() { 1.0f32 } else { 0.0 });
        let [a, b, c, d] = places.map(|address| address as *mut c_void);
        let [a_layout, b_layout, c_layout, d_layout] = &described.layouts;
        // SAFETY: descriptions and factors live until the call returns, and it reads factors before that. The addresses are those of views
        // that the host has checked to end inside their buffers, under extents and strides from which the layouts were made; buffers
        // outlive the work (see `Words::drop`). The algorithm was chosen for this shape and alignment, and for as much workspace.
        unsafe {
            result::matmul(
                self.handle,
                described.product.0,
                bytes(&alpha).0,
                bytes(&beta).0,
                a,
                a_layout.0,
                b,
                b_layout.0,
                c,
                c_layout.0,
                d,
                d_layout.0,
                &algorithm,
                room as *mut c_void,
                words * 4,
                queue.stream.cu_stream().cast(),
            )
        }?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::Pairs;

    /// Holds on every machine.
    #[test]
    fn a_library_that_is_not_there_is_named() {
        match missing() {
            Some(reason) => assert!(reason.contains("libcublasLt") && !reason.contains('\n'), "{reason}"),
            None => println!("libcublasLt is installed"),
        }
    }

    fn call(pairs: Option<Pairs>, count: usize) -> GemmCall {
        let spot = Spot { binding: Binding::Arena, word: 0 };
        let matrix = |lead: usize, turned: bool| Matrix { spot, lead, apart: 4096, turned };
        GemmCall {
            count,
            extents: [66, 72, 136],
            pairs,
            rows: matrix(136, false),
            columns: matrix(72, true),
            result: matrix(72, false),
            addend: Some(matrix(80, false)),
            bias: Some(spot),
            workspace: (spot, 1024),
        }
    }

    /// Everything but a card: what products are described by is taken, and a handle is refused in words.
    #[test]
    #[ignore = "needs libcublasLt, found as libraries are, for one in LD_LIBRARY_PATH; a card is not needed"]
    fn the_library_takes_what_products_are_described_by() {
        assert_eq!(missing(), None);
        for (pairs, count) in [(None, 1), (Some(Pairs::Brain), 1), (None, 6)] {
            let described = Described::new(&call(pairs, count), Some(4096));
            assert!(described.is_ok(), "{:?}", described.map(drop).unwrap_err());
        }
        match result::create_handle() {
            // SAFETY: made just now.
            Ok(handle) => unsafe { result::destroy_handle(handle) }.unwrap(),
            Err(error) => println!("without a card: {}", Fault::from(error)),
        }
        // SAFETY: the library is loaded.
        println!("cuBLASLt {}", unsafe { sys::cublasLtGetVersion() });
    }

    #[test]
    fn an_address_is_aligned_as_its_lowest_bit_says() {
        assert_eq!([0x100, 0x1000, 0x110, 0x104].map(alignment), [256, 256, 16, 4]);
    }
}
