//! What the page must show.

use std::path::Path;

use super::webdriver::Browser;

pub const PROMPT: &str = "Once upon a time, Mia and her dog Rex";
pub const TOKENS: usize = 64;
pub const SENTENCE: &str = "The cat sits on the warm windowsill.";

/// Where the site has a page whose device fails as it is told.
pub const FAULTY: &str = "/faults/";

/// How far a number of a unit vector may be from the native program's, which sums in the same order but rounds a product and its sum
/// once. Encoders of a few layers stay within some units in the last place of 1.
const NEAR: f32 = 16.0 * f32::EPSILON;

/// What the native program answers.
pub struct Expected {
    pub story: String,
    pub tiny: Vec<f32>,
    pub minilm: Option<Vec<f32>>,
}

/// The page in a browser.
pub struct Page<'t> {
    browser: &'t mut Browser,
    address: &'t str,
    expected: &'t Expected,
    shots: &'t Path,
}

impl<'t> Page<'t> {
    pub fn new(
        browser: &'t mut Browser,
        address: &'t str,
        expected: &'t Expected,
        shots: &'t Path,
    ) -> Page<'t> {
        Page { browser, address, expected, shots }
    }

    /// On the processor, in a browser that shows no adapter.
    pub fn without_device(&mut self) -> Result<(), String> {
        self.browser.open(self.address)?;
        self.story("auto", TOKENS)?;
        let why = "the browser shows no WebGPU adapter";
        self.shows("#story .device", &["CPU, 1 thread, simd128", why])?;
        self.same_story(TOKENS)?;
        self.embeds("auto", "models/tiny/", &self.expected.tiny, NEAR)?;
        // Plain code fuses products and sums as the native program does, so bits are equal.
        self.embeds("scalar", "models/tiny/", &self.expected.tiny, 0.0)?;
        self.shows("#encoder .device", &["CPU, 1 thread, scalar"])?;
        if let Some(vector) = &self.expected.minilm {
            self.embeds("auto", "models/all-MiniLM-L6-v2/", vector, NEAR)?;
        }
        self.browser.screenshot(&self.shots.join("cpu.png"))?;
        self.fits_a_phone()?;
        self.faults(why)?;
        self.stops()
    }

    /// On a device that computes on the processor: not taken by itself, right when asked for.
    pub fn with_device(&mut self) -> Result<(), String> {
        self.browser.open(self.address)?;
        self.story("auto", 4)?;
        self.shows("#story .device", &["CPU, 1 thread, simd128", "computes on the CPU itself"])?;
        self.story("gpu", TOKENS)?;
        self.shows("#story .device", &["Runs on: gpu (", "WebGPU was asked for"])?;
        self.same_story(TOKENS)?;
        self.embeds("gpu", "models/tiny/", &self.expected.tiny, NEAR)?;
        self.shows("#encoder .device", &["Runs on: gpu ("])?;
        if let Some(vector) = &self.expected.minilm {
            self.embeds("gpu", "models/all-MiniLM-L6-v2/", vector, NEAR)?;
        }
        self.browser.screenshot(&self.shots.join("webgpu.png"))
    }

    fn set(&mut self, id: &str, value: &str) -> Result<(), String> {
        let script = format!("document.getElementById({id:?}).value = {value:?};");
        self.browser.run(&script).map(drop)
    }

    /// Presses a button of a part and waits for the end: its state and message.
    fn press(&mut self, part: &str, button: &str) -> Result<(String, String), String> {
        self.browser.run(&format!("document.getElementById({button:?}).click();"))?;
        self.ended(part)
    }

    fn ended(&mut self, part: &str) -> Result<(String, String), String> {
        let found = self.browser.wait(&format!(
            "const part = document.getElementById({part:?});
             const {{ state }} = part.dataset;
             return state === 'done' || state === 'failed' ? [state, part.querySelector('.status').textContent] : null;"
        ))?;
        let text = |at: usize| found[at].as_str().unwrap_or_default().to_owned();
        Ok((text(0), text(1)))
    }

    fn text(&mut self, selector: &str) -> Result<String, String> {
        let script = format!("return document.querySelector({selector:?}).textContent;");
        Ok(self.browser.run(&script)?.as_str().unwrap_or_default().to_owned())
    }

    fn shows(&mut self, selector: &str, parts: &[&str]) -> Result<(), String> {
        let text = self.text(selector)?;
        match parts.iter().find(|part| !text.contains(**part)) {
            Some(part) => Err(format!("{selector} lacks {part:?}: {text:?}")),
            None => Ok(()),
        }
    }

    fn story(&mut self, device: &str, tokens: usize) -> Result<(), String> {
        self.set("device", device)?;
        self.set("prompt", PROMPT)?;
        self.set("tokens", &tokens.to_string())?;
        let (state, message) = self.press("story", "tell")?;
        println!("story on {device}: {message}\n  {}", self.text("#story .device")?);
        if state == "done" { Ok(()) } else { Err(format!("the story on {device}: {message}")) }
    }

    fn same_story(&mut self, tokens: usize) -> Result<(), String> {
        let (found, wanted) = (self.text("#generated")?, &self.expected.story);
        let same = if tokens == TOKENS { found == *wanted } else { wanted.starts_with(&found) };
        match same && !found.is_empty() {
            true => Ok(()),
            false => Err(format!("{tokens} tokens differ\n  page:   {found:?}\n  native: {wanted:?}")),
        }
    }

    fn embeds(&mut self, device: &str, folder: &str, wanted: &[f32], near: f32) -> Result<(), String> {
        self.set("device", device)?;
        self.set("address", folder)?;
        self.set("sentence", SENTENCE)?;
        let (state, message) = self.press("encoder", "compare")?;
        if state != "done" {
            return Err(format!("{folder} on {device}: {message}"));
        }
        let text = self.text("#vector")?;
        let found: Vec<f32> = serde_json::from_str(&text).map_err(|error| format!("{error}: {text}"))?;
        let apart = found.iter().zip(wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        println!("{folder} on {device}: {message} At most {apart:e} from the native program's numbers.");
        println!("  {}", self.text("#encoder .device")?);
        if found.len() == wanted.len() && apart <= near {
            return Ok(());
        }
        Err(format!(
            "{folder} on {device}: {} and {} numbers, {apart:e} apart; at most {near:e} is expected",
            found.len(),
            wanted.len()
        ))
    }

    /// Nothing is wider than a narrow screen.
    fn fits_a_phone(&mut self) -> Result<(), String> {
        self.browser.resize(360, 1400, true)?;
        let width = self.browser.run("return document.documentElement.scrollWidth;")?;
        self.browser.screenshot(&self.shots.join("phone.png"))?;
        self.browser.resize(1200, 1000, false)?;
        if width.as_u64() == Some(360) { Ok(()) } else { Err(format!("{width} points on a screen of 360")) }
    }

    /// What cannot be done is said in words, and the page goes on.
    fn faults(&mut self, why: &str) -> Result<(), String> {
        self.set("device", "gpu")?;
        let (state, message) = self.press("story", "tell")?;
        if state != "failed" || !message.contains(why) {
            return Err(format!("WebGPU without an adapter: {state}, {message}"));
        }
        self.set("device", "auto")?;
        self.set("address", "models/absent/")?;
        let (state, message) = self.press("encoder", "compare")?;
        if state != "failed" || !message.contains("config.json") || !message.contains("404") {
            return Err(format!("an absent model: {state}, {message}"));
        }
        self.set("prompt", "")?;
        let (state, message) = self.press("story", "tell")?;
        println!("an empty beginning: {state}, {message}");
        self.story("cpu", 4)
    }

    /// A device that fails is named with what it did and the cause. One that was asked for is asked for anew the next time; in the place of
    /// one that was taken by itself the CPU goes on.
    pub fn device_faults(&mut self) -> Result<(), String> {
        let address = format!("{}{}index.html", self.address, FAULTY.trim_start_matches('/'));
        self.browser.open(&address)?;
        self.story("auto", 4)?;
        self.shows("#story .device", &["Runs on: gpu (", "the browser has the WebGPU adapter"])?;
        let lost = ["the device is lost: gpu (", "running llama: "];
        self.fault("{ kind: 'lost', spared: 3 }")?;
        self.story("auto", TOKENS)?;
        self.same_story(TOKENS)?;
        self.shows("#story .device", &["CPU, 1 thread, simd128", lost[0], lost[1], "; the CPU goes on"])?;
        self.fault("{ kind: 'kernel', name: 'pool' }")?;
        let refused = ["kernel pool_mean at gpu (", "line ", "cannot be represented as"];
        self.embeds("auto", "/models/tiny/", &self.expected.tiny, NEAR)?;
        self.shows("#encoder .device", &["CPU, 1 thread, simd128", refused[0], refused[1], refused[2]])?;
        self.set("device", "gpu")?;
        let (state, message) = self.press("encoder", "compare")?;
        told("a refused kernel", &state, &message, &refused)?;
        self.fault("{ kind: 'lost', spared: 8 }")?;
        self.set("tokens", "16")?;
        let (state, message) = self.press("story", "tell")?;
        told("a lost device", &state, &message, &lost)?;
        self.fault("{}")?;
        self.story("gpu", 4)?;
        self.shows("#story .device", &["Runs on: gpu (", "WebGPU was asked for"])?;
        self.same_story(4)
    }

    /// Says how the device of the faulty page is to fail; without a kind it does not.
    fn fault(&mut self, fault: &str) -> Result<(), String> {
        let script = format!(
            "const channel = new BroadcastChannel('faults');
             channel.postMessage({fault});
             channel.close();"
        );
        self.browser.run(&script).map(drop)
    }

    /// A text ends when it is told to: by plain code, whose pieces come slowly enough to be told.
    fn stops(&mut self) -> Result<(), String> {
        self.set("device", "scalar")?;
        self.set("tokens", "400")?;
        self.browser.run(
            "const text = document.getElementById('text');
             new MutationObserver((_, watch) => {
               if (document.getElementById('generated')?.textContent) {
                 watch.disconnect();
                 document.getElementById('stop').click();
               }
             }).observe(text, { childList: true, subtree: true });",
        )?;
        let (state, message) = self.press("story", "tell")?;
        let length = self.text("#generated")?.len();
        match state == "done" && message.contains("stopped") && length < self.expected.story.len() {
            true => Ok(()),
            false => Err(format!("a story that was stopped: {state}, {message}, {length} bytes")),
        }
    }
}

/// Whether a try failed with a message that has all parts.
fn told(what: &str, state: &str, message: &str, parts: &[&str]) -> Result<(), String> {
    println!("{what}: {message}");
    match state == "failed" && parts.iter().all(|part| message.contains(part)) {
        true => Ok(()),
        false => Err(format!("{what}: {state}, {message}; {parts:?} is expected")),
    }
}
