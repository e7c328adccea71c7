//! Shaders without the bounds checks that a verified kernel does not need, pipelines that were made before, and instances without
//! windows.
#![expect(
    unsafe_code,
    reason = "leaving checks out is a promise that the kernel verifier gives, what a file holds one that its checksum gives"
)]

#[cfg(target_os = "linux")]
use std::ffi::CStr;

/// An instance of wgpu that shows nothing on a screen.
///
/// Its extensions for windows stay off: with them, Mesa's layer that orders devices connects to a display, and where there is none the
/// display's library writes to standard error.
#[cfg(target_os = "linux")]
pub(crate) fn instance() -> wgpu::Instance {
    use wgpu::hal::{InstanceDescriptor, api::Vulkan, vulkan};
    const WINDOWS: [&CStr; 3] = [c"VK_KHR_wayland_surface", c"VK_KHR_xcb_surface", c"VK_KHR_xlib_surface"];
    let plain = descriptor();
    let desc = InstanceDescriptor {
        name: "rlx",
        flags: plain.flags,
        memory_budget_thresholds: plain.memory_budget_thresholds,
        backend_options: plain.backend_options.clone(),
        telemetry: None,
        display: None,
    };
    let without_windows = |args: vulkan::CreateInstanceCallbackArgs<'_, '_, '_>| {
        args.extensions.retain(|name| !WINDOWS.contains(name));
    };
    // SAFETY: wgpu looks for these three extensions before it makes a surface of a window, and nothing here makes a surface.
    let headless = unsafe { vulkan::Instance::init_with_callback(&desc, Some(Box::new(without_windows))) };
    match headless {
        // SAFETY: the instance was made just now, and nothing else holds it.
        Ok(headless) => unsafe { wgpu::Instance::from_hal::<Vulkan>(headless) },
        Err(_) => wgpu::Instance::new(plain),
    }
}

/// An instance of wgpu that shows nothing on a screen.
#[cfg(not(target_os = "linux"))]
pub(crate) fn instance() -> wgpu::Instance {
    wgpu::Instance::new(descriptor())
}

fn descriptor() -> wgpu::InstanceDescriptor {
    let mut plain = wgpu::InstanceDescriptor::new_without_display_handle();
    // A debug build would note each instruction's line, for which the text is counted from its beginning each time.
    plain.flags.remove(wgpu::InstanceFlags::DEBUG);
    plain
}

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
