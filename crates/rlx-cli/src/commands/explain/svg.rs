//! The memory plan as a picture: steps to the right, the arena downwards, a rectangle a buffer.

use rlx::plan::Lir;
use std::fmt::Write as _;

const WIDTH: f64 = 1200.0;
const HEIGHT: f64 = 600.0;

/// Draws the arena of a plan as an SVG document.
pub fn draw(lir: &Lir) -> String {
    let template = lir.template();
    let (steps, bytes) = (template.steps().len().max(1) as f64, lir.arena_bytes().max(1) as f64);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{HEIGHT}\" font-family=\"sans-serif\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#f8f8f8\"/>\n"
    );
    for (id, range) in lir.placed() {
        let buffer = &template.buffers()[id.index()];
        let x = buffer.first as f64 / steps * WIDTH;
        let width = (buffer.last + 1).saturating_sub(buffer.first) as f64 / steps * WIDTH;
        let (y, height) = (range.start as f64 / bytes * HEIGHT, range.len() as f64 / bytes * HEIGHT);
        let _ = writeln!(
            svg,
            "<rect x=\"{x:.2}\" y=\"{y:.2}\" width=\"{width:.2}\" height=\"{height:.2}\" fill=\"hsl({hue},60%,70%)\" \
             stroke=\"#444\" stroke-width=\"0.5\"><title>{id}: {size} bytes at {start}, steps {first} to {last}</title></rect>",
            hue = id.index() * 47 % 360,
            size = range.len(),
            start = range.start,
            first = buffer.first,
            last = buffer.last,
        );
    }
    let _ = writeln!(
        svg,
        "<text x=\"8\" y=\"18\" font-size=\"13\">{} bytes over {} steps</text>\n</svg>",
        lir.arena_bytes(),
        template.steps().len()
    );
    svg
}
