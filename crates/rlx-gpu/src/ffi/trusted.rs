//! Shaders without the bounds checks that a verified kernel does not need.
#![expect(unsafe_code, reason = "leaving checks out is a promise that the kernel verifier gives")]

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
