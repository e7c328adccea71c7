//! Every kernel of the zoo through naga: parsed, validated, and translated to what Vulkan, Metal and DirectX take.

use super::zoo;
use crate::print::wgsl;
use naga::back::{hlsl, msl, spv};
use naga::valid::{Capabilities, ValidationFlags, Validator};

#[test]
fn every_kernel_is_valid_and_translates_to_spirv_msl_and_hlsl() {
    let kernels = zoo();
    assert!(kernels.len() > 100, "{}", kernels.len());
    for kernel in &kernels {
        let text = wgsl::print(kernel);
        let module = naga::front::wgsl::parse_str(&text)
            .unwrap_or_else(|e| panic!("{}\n{text}", e.emit_to_string(&text)));
        let halves = Capabilities::default() | Capabilities::SHADER_FLOAT16_IN_FLOAT32;
        let mut validator = Validator::new(ValidationFlags::all(), halves);
        let info =
            validator.validate(&module).unwrap_or_else(|e| panic!("{}\n{text}", e.emit_to_string(&text)));
        let words = spv::write_vec(&module, &info, &spv::Options::default(), None);
        assert!(!words.unwrap_or_else(|e| panic!("{e}\n{text}")).is_empty());
        let options = msl::Options { fake_missing_bindings: true, ..msl::Options::default() };
        let metal = msl::write_string(&module, &info, &options, &msl::PipelineOptions::default());
        assert!(metal.unwrap_or_else(|e| panic!("{e}\n{text}")).0.contains("kernel void"));
        let (mut out, options) = (String::new(), hlsl::Options::default());
        let pipeline = hlsl::PipelineOptions::default();
        let mut writer = hlsl::Writer::new(&mut out, &options, &pipeline);
        writer.write(&module, &info, None).unwrap_or_else(|e| panic!("{e}\n{text}"));
        assert!(out.contains("numthreads"));
    }
    println!("{} kernels", kernels.len());
}
