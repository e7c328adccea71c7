//! Shaders without the bounds checks that a verified kernel does not need, and pipelines that were made before.
#![expect(
    unsafe_code,
    reason = "leaving checks out is a promise that the kernel verifier gives, what a file holds one that its checksum gives"
)]

/// A module of a kernel's text; release builds leave out the checks of indices and loops, which cost up to a hundred times a loop's
/// time on some drivers.
pub(crate) fn module(device: &wgpu::Device, label: &str, text: &str) -> wgpu::ShaderModule {
    let source = wgpu::ShaderSource::Wgsl(text.into());
    let desc = wgpu::ShaderModuleDescriptor { label: Some(label), source };
    if cfg!(debug_assertions) {
        return device.create_shader_module(desc);
    }
    // SAFETY: the text is printed from a kernel that the verifier accepted: each coordinate is below its view's extent or masked, the
    // host checks before each run that views end inside their buffers, and every loop ends.
    unsafe { device.create_shader_module_trusted(desc, wgpu::ShaderRuntimeChecks::unchecked()) }
}

/// The driver's cache of pipelines, from what it gave before.
pub(crate) fn pipelines(device: &wgpu::Device, data: Option<&[u8]>) -> wgpu::PipelineCache {
    let desc = wgpu::PipelineCacheDescriptor { label: Some("rlx"), data, fallback: true };
    // SAFETY: the data is what `get_data` gave: it comes from an entry of the cache folder with a digest, stamped with the adapter and its
    // driver's version, and the driver checks both again.
    unsafe { device.create_pipeline_cache(&desc) }
}
