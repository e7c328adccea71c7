//! The arena as a picture: steps from left to right, offsets from bottom to top, a rectangle a buffer.

use super::lir::Lir;
use super::places::BufferId;
use std::fmt::Write;

const WIDTH: f64 = 1200.0;
const HEIGHT: f64 = 600.0;
const LEFT: f64 = 80.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 40.0;

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
        let (width, height) = (LEFT + WIDTH + 20.0, TOP + HEIGHT + BOTTOM);
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
        let (x, y) = (LEFT + WIDTH / 2.0, height - 8.0);
        writeln!(svg, r#"<text x="{x}" y="{y}" text-anchor="middle">step</text>"#)?;
        for (id, range) in self.placed().filter(|(_, range)| !range.is_empty()) {
            let buffer = &self.template().buffers()[id.index()];
            let x = LEFT + buffer.first as f64 * x_scale;
            let w = (buffer.last + 1 - buffer.first) as f64 * x_scale;
            let (y, h) = (TOP + HEIGHT - range.end as f64 * y_scale, range.len() as f64 * y_scale);
            let made_by = self.maker(id);
            let hue = (id.index() * 47) % 360;
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
            let label = format!("{id} {made_by}");
            if h >= 11.0 && w >= 6.5 * label.len() as f64 {
                let (x, y) = (x + 3.0, y + h / 2.0 + 4.0);
                writeln!(svg, r#"<text x="{x:.2}" y="{y:.2}">{}</text>"#, escaped(&label))?;
            }
        }
        writeln!(svg, "</svg>")
    }

    /// The op of the step that writes a buffer first.
    fn maker(&self, id: BufferId) -> String {
        let step = self.template().steps().get(self.template().buffers()[id.index()].first);
        step.map_or(String::new(), |step| step.op.def().name().to_owned())
    }
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
    fn names_cannot_break_the_document() {
        assert_eq!(super::escaped("<a & \"b\">"), "&lt;a &amp; &quot;b&quot;&gt;");
    }
}
