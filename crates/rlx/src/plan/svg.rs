//! The arena as a picture: steps from left to right, offsets from bottom to top, a rectangle a buffer, a colour for each op that makes
//! buffers.

use super::lir::Lir;
use super::places::BufferId;
use std::fmt::Write;

const WIDTH: f64 = 1200.0;
const HEIGHT: f64 = 600.0;
const LEFT: f64 = 80.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 40.0;
/// Height of a line of the legend, and about the width of a letter.
const LINE: f64 = 18.0;
const LETTER: f64 = 6.5;

impl Lir {
    /// The memory plan as an SVG document. Each rectangle names the step that makes the buffer; its tooltip has steps and bytes.
    pub fn svg(&self) -> String {
        let mut svg = String::new();
        // Writing to a `String` cannot fail.
        let _ = self.write_svg(&mut svg);
        svg
    }

    fn write_svg(&self, svg: &mut String) -> std::fmt::Result {
        let steps = self.template().steps().len().max(1);
        let arena = self.arena_bytes().max(1);
        let (x_scale, y_scale) = (WIDTH / steps as f64, HEIGHT / arena as f64);
        let ops = self.makers();
        let (legend, lines) = legend(&ops);
        let (width, height) = (LEFT + WIDTH + 20.0, TOP + HEIGHT + BOTTOM + lines as f64 * LINE);
        writeln!(
            svg,
            r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">"#
        )?;
        writeln!(svg, r#"<rect width="{width}" height="{height}" fill="white"/>"#)?;
        let title = format!(
            "{}: arena {}, live bytes at least {}, {steps} steps",
            self.template().name(),
            bytes_text(self.arena_bytes()),
            bytes_text(self.live_bytes_bound()),
        );
        writeln!(svg, r#"<text x="{LEFT}" y="20" font-size="14">{}</text>"#, escaped(&title))?;
        for i in 0..=4 {
            let y = TOP + HEIGHT - HEIGHT * f64::from(i) / 4.0;
            let label = bytes_text(self.arena_bytes() / 4 * i as usize);
            writeln!(svg, r##"<path d="M{LEFT} {y}h{WIDTH}" stroke="#ddd"/>"##)?;
            writeln!(svg, r#"<text x="{}" y="{}" text-anchor="end">{label}</text>"#, LEFT - 6.0, y + 4.0)?;
            let (x, step) = (LEFT + WIDTH * f64::from(i) / 4.0, steps * i as usize / 4);
            let y = TOP + HEIGHT + 16.0;
            writeln!(svg, r#"<text x="{x:.1}" y="{y}" text-anchor="middle">{step}</text>"#)?;
        }
        let (x, y) = (LEFT + WIDTH / 2.0, TOP + HEIGHT + BOTTOM - 8.0);
        writeln!(svg, r#"<text x="{x}" y="{y}" text-anchor="middle">step</text>"#)?;
        for (id, range) in self.placed().filter(|(_, range)| !range.is_empty()) {
            let buffer = &self.template().buffers()[id.index()];
            let x = LEFT + buffer.first as f64 * x_scale;
            let w = (buffer.last + 1 - buffer.first) as f64 * x_scale;
            let (y, h) = (TOP + HEIGHT - range.end as f64 * y_scale, range.len() as f64 * y_scale);
            let made_by = self.maker(id);
            let hue = ops.iter().position(|op| *op == made_by).map_or(0, |at| hue(at, ops.len()));
            let bytes = bytes_text(range.len());
            writeln!(
                svg,
                r##"<rect x="{x:.2}" y="{y:.2}" width="{w:.2}" height="{h:.2}" fill="hsl({hue},60%,75%)" stroke="#555" stroke-width="0.5"><title>{id} {} : steps {} to {}, bytes {} to {} ({bytes})</title></rect>"##,
                escaped(&made_by),
                buffer.first,
                buffer.last,
                range.start,
                range.end,
            )?;
            let label = format!("{id} {made_by} {bytes}");
            let long = LETTER * label.len() as f64;
            let (x, y) = (x + w / 2.0, y + h / 2.0);
            if h >= 11.0 && w >= long {
                let (y, label) = (y + 4.0, escaped(&label));
                writeln!(svg, r#"<text x="{x:.2}" y="{y:.2}" text-anchor="middle">{label}</text>"#)?;
            } else if w >= 11.0 && h >= long {
                let (x, label) = (x + 4.0, escaped(&label));
                writeln!(
                    svg,
                    r#"<text transform="translate({x:.2} {y:.2}) rotate(-90)" text-anchor="middle">{label}</text>"#
                )?;
            }
        }
        for (at, (x, line)) in legend.into_iter().enumerate() {
            let (y, hue) = (TOP + HEIGHT + BOTTOM + line as f64 * LINE, hue(at, ops.len()));
            writeln!(
                svg,
                r##"<rect x="{x:.1}" y="{y:.1}" width="12" height="12" fill="hsl({hue},60%,75%)" stroke="#555"/>"##
            )?;
            let (x, y) = (x + 17.0, y + 10.0);
            writeln!(svg, r#"<text x="{x:.1}" y="{y:.1}">{}</text>"#, escaped(&ops[at]))?;
        }
        writeln!(svg, "</svg>")
    }

    /// The ops that make buffers of the arena, in order.
    fn makers(&self) -> Vec<String> {
        let mut ops = Vec::new();
        for (id, _) in self.placed().filter(|(_, range)| !range.is_empty()) {
            let op = self.maker(id);
            if !ops.contains(&op) {
                ops.push(op);
            }
        }
        ops
    }

    /// The op of the step that writes a buffer first.
    fn maker(&self, id: BufferId) -> String {
        let step = self.template().steps().get(self.template().buffers()[id.index()].first);
        step.map_or(String::new(), |step| step.op.def().name().to_owned())
    }
}

/// Colours as far apart as there is room for.
fn hue(at: usize, count: usize) -> usize {
    at * 360 / count.max(1)
}

/// Where each op of the legend stands, left edge and line, and how many lines there are.
fn legend(ops: &[String]) -> (Vec<(f64, usize)>, usize) {
    let (mut x, mut line, mut places) = (LEFT, 0, Vec::with_capacity(ops.len()));
    for op in ops {
        let width = 34.0 + LETTER * op.len() as f64;
        if x + width > LEFT + WIDTH && x > LEFT {
            (x, line) = (LEFT, line + 1);
        }
        places.push((x, line));
        x += width;
    }
    (places, line + 1)
}

fn bytes_text(bytes: usize) -> String {
    match bytes {
        0..=9_999 => format!("{bytes} B"),
        10_000..=9_999_999 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        _ => format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64),
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use crate::plan::text::tests::small_lir;

    #[test]
    fn every_buffer_of_the_arena_is_one_rectangle_inside_the_frame() {
        let lir = small_lir();
        let svg = lir.svg();
        let rectangles: Vec<&str> = svg.lines().filter(|l| l.contains("<title>")).collect();
        assert_eq!(rectangles.len(), lir.placed().filter(|(_, r)| !r.is_empty()).count());
        assert!(!rectangles.is_empty());
        for line in rectangles {
            let number = |name: &str| -> f64 {
                let start = line.find(&format!(" {name}=\"")).unwrap() + name.len() + 3;
                line[start..].split('"').next().unwrap().parse().unwrap()
            };
            assert!(
                number("x") >= super::LEFT
                    && number("x") + number("width") <= super::LEFT + super::WIDTH + 0.1
            );
            assert!(number("y") >= super::TOP - 0.1 && number("height") > 0.0);
            assert!(number("y") + number("height") <= super::TOP + super::HEIGHT + 0.1);
        }
    }

    #[test]
    fn every_op_that_makes_a_buffer_is_in_the_legend_and_a_long_legend_wraps() {
        let lir = small_lir();
        let svg = lir.svg();
        let makers = lir.makers();
        assert!(!makers.is_empty());
        assert!(makers.iter().all(|op| svg.contains(&format!(">{op}</text>"))));
        let many: Vec<String> = (0..40).map(|i| format!("an_op_with_a_long_name_{i}")).collect();
        let (places, lines) = super::legend(&many);
        assert!(lines > 1 && places.iter().all(|(x, line)| *x < super::LEFT + super::WIDTH && *line < lines));
        let hues: std::collections::HashSet<usize> = (0..40).map(|at| super::hue(at, 40)).collect();
        assert_eq!(hues.len(), 40);
    }

    #[test]
    fn names_cannot_break_the_document() {
        assert_eq!(super::escaped("<a & \"b\">"), "&lt;a &amp; &quot;b&quot;&gt;");
    }
}
