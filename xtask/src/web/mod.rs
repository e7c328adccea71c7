//! `cargo xtask web`: the module that a web page loads, and the page of `examples/web` in Chromium.

mod page;
mod site;
mod webdriver;

use std::path::{Path, PathBuf};

use crate::ci::FEATURES;
use crate::config::Config;
use crate::{debian, minilm, process};
use page::{Expected, Page};
use site::Site;
use webdriver::Browser;

const TARGET: &str = "wasm32-unknown-unknown";
/// The profile of the module that pages load.
const PROFILE: &str = "web";
/// The profile of the module that CI tests: quick to build, with the checks of a debug build.
const CHECKED: &str = "web-test";
const MODULE: &str = "rlx_web.wasm";
/// The page and its module, as a site serves them.
const FOLDER: &str = "target/web-page";
const PAGE: &str = "examples/web/page";
/// A sentence encoder of random weights, small enough for every device.
const TINY: &str = "crates/rlx-conformance/data/models/bert-mean";
/// The device of a page that is tested for faults.
const FAULTS: &str = "xtask/src/web/faults.js";
const MINILM: &str = "all-MiniLM-L6-v2";

/// Without arguments, the test, `--quick` as CI does it; `--build` stops at the folder, `--serve` shows it to a browser.
pub fn run(config: &Config, args: &[String]) -> Result<(), String> {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let minilm = config.minilm_dir.clone().or_else(|| minilm::find(&config.root));
    match args[..] {
        [] => {
            debian::install(&config.root, &missing(&config.root))?;
            build(config, PROFILE)?;
            test(config, minilm.as_deref())
        }
        ["--quick"] => check(config, minilm.as_deref()),
        ["--build"] => build(config, PROFILE),
        ["--serve"] => serve(config, minilm.as_deref(), 8080),
        ["--serve", port] => {
            let port = port.parse().map_err(|_| format!("`{port}` is no port"))?;
            serve(config, minilm.as_deref(), port)
        }
        _ => Err(format!(
            "web takes `--quick`, `--build`, `--serve [PORT]` or nothing, not `{}`",
            args.join(" ")
        )),
    }
}

/// Debian's packages of Chromium and its driver, unless they are there.
pub fn missing(root: &Path) -> Vec<&'static str> {
    let there =
        |program: &str| process::capture(&mut process::command(program, &["--version"], root)).is_ok();
    if there("chromedriver") && there("chromium") { Vec::new() } else { vec!["chromium", "chromium-driver"] }
}

/// Builds the module and puts it beside the page.
fn build(config: &Config, profile: &str) -> Result<(), String> {
    process::run(&mut process::command("rustup", &["target", "add", TARGET], &config.root))?;
    let args = ["build", "--locked", "--profile", profile, "--target", TARGET, "--package", "rlx-web"];
    process::run(&mut config.cargo(&args))?;
    let folder = config.root.join(FOLDER);
    let io = |path: &Path, error: std::io::Error| format!("{}: {error}", path.display());
    std::fs::create_dir_all(&folder).map_err(|error| io(&folder, error))?;
    let page = config.root.join(PAGE);
    for entry in std::fs::read_dir(&page).map_err(|error| io(&page, error))? {
        let from = entry.map_err(|error| io(&page, error))?;
        std::fs::copy(from.path(), folder.join(from.file_name())).map_err(|error| io(&from.path(), error))?;
    }
    let module = config.root.join("target").join(TARGET).join(profile).join(MODULE);
    let bytes = std::fs::copy(&module, folder.join(MODULE)).map_err(|error| io(&module, error))?;
    println!("{FOLDER}/{MODULE}: {:.2} MB", bytes as f64 / 1e6);
    Ok(())
}

/// What the site shows: the page, and models for it to fetch.
fn folders(config: &Config, minilm: Option<&Path>) -> Vec<(String, PathBuf)> {
    let mut folders = vec![
        ("/models/tiny/".to_owned(), config.root.join(TINY)),
        (format!("{}gpu.js", page::FAULTY), config.root.join(FAULTS)),
        (page::FAULTY.to_owned(), config.root.join(FOLDER)),
        ("/".to_owned(), config.root.join(FOLDER)),
    ];
    if let Some(minilm) = minilm {
        folders.insert(0, (format!("/models/{MINILM}/"), minilm.to_owned()));
    }
    folders
}

fn serve(config: &Config, minilm: Option<&Path>, port: u16) -> Result<(), String> {
    build(config, PROFILE)?;
    let site = Site::open(folders(config, minilm), port)?;
    let encoder = minilm.map_or("tiny", |_| MINILM);
    println!("http://localhost:{}/?encoder=models/{encoder} (end with Ctrl-C)", site.port());
    site.wait();
    Ok(())
}

/// The stage of CI: the same, of a module that is quick to build.
pub fn check(config: &Config, minilm: Option<&Path>) -> Result<(), String> {
    build(config, CHECKED)?;
    test(config, minilm)
}

/// The page in Chromium, without a WebGPU adapter and with one that computes on the processor, against the native program.
fn test(config: &Config, minilm: Option<&Path>) -> Result<(), String> {
    let expected = expected(config, minilm)?;
    let site = Site::open(folders(config, minilm), 0)?;
    let address = format!("http://localhost:{}/", site.port());
    let shots = config.root.join(FOLDER);
    let mut plain = Browser::start(&config.root, &[])?;
    Page::new(&mut plain, &address, &expected, &shots).without_device()?;
    drop(plain);
    let mut software = Browser::start(&config.root, &["--enable-unsafe-webgpu"])?;
    let mut page = Page::new(&mut software, &address, &expected, &shots);
    page.with_device()?;
    page.device_faults()
}

/// What the native program answers.
fn expected(config: &Config, minilm: Option<&Path>) -> Result<Expected, String> {
    // With a test of the program, as CI's tests built it; alone it would have packages with fewer features, built anew.
    let build =
        ["test", "--workspace", "--locked", "--quiet", "--features", FEATURES, "--test", "cli", "--no-run"];
    process::run(&mut config.cargo(&build))?;
    let rlx = config.root.join("target/debug/rlx");
    let answer = |args: &[&str]| -> Result<serde_json::Value, String> {
        let shared = ["--json", "--device", "cpu", "--precision", "f32"];
        let args = [args, &shared].concat();
        let text = process::capture(&mut process::command(&rlx.to_string_lossy(), &args, &config.root))?;
        serde_json::from_str(&text).map_err(|error| format!("rlx {}: {error}", args.join(" ")))
    };
    let tokens = page::TOKENS.to_string();
    let story = answer(&["generate", "--prompt", page::PROMPT, "--max-tokens", &tokens])?;
    let vector = |folder: &Path| -> Result<Vec<f32>, String> {
        let answer = answer(&["embed", &folder.to_string_lossy(), page::SENTENCE])?;
        let numbers = answer["embeddings"][0].as_array().ok_or("rlx embed gives no vector")?;
        Ok(numbers.iter().map(|number| number.as_f64().unwrap_or(f64::NAN) as f32).collect())
    };
    Ok(Expected {
        story: story["text"].as_str().ok_or("rlx generate gives no text")?.to_owned(),
        tiny: vector(&config.root.join(TINY))?,
        minilm: minilm.map(vector).transpose()?,
    })
}
