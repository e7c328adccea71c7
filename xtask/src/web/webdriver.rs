//! A browser, driven through its WebDriver server.

use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use crate::process;

/// How long the server or a page may take.
const PATIENCE: Duration = Duration::from_secs(300);

/// One window of a browser of its own.
pub struct Browser {
    driver: Child,
    port: u16,
    session: String,
    profile: PathBuf,
}

impl Browser {
    /// Starts a headless Chromium with an empty profile.
    pub fn start(root: &Path, flags: &[&str]) -> Result<Browser, String> {
        let port = free_port()?;
        let profile = std::env::temp_dir().join(format!("rlx-web-{}-{port}", std::process::id()));
        let mut command = process::command("chromedriver", &[&format!("--port={port}")], root);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let driver = command.spawn().map_err(|error| process::start_error(&command, &error))?;
        let mut browser = Browser { driver, port, session: String::new(), profile };
        let started = Instant::now();
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
            if started.elapsed() > PATIENCE {
                return Err("chromedriver does not answer".to_owned());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let data = format!("--user-data-dir={}", browser.profile.display());
        let quiet = [
            "--headless",
            "--no-sandbox",
            "--disable-quic",
            // A container's shared memory is too small for pages.
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--window-size=1200,1000",
            &data,
        ];
        let args: Vec<&str> = quiet.iter().chain(flags).copied().collect();
        let options = json!({ "args": args });
        let wanted = json!({ "browserName": "chrome", "goog:chromeOptions": options });
        let session = browser.post("/session", &json!({ "capabilities": { "alwaysMatch": wanted } }))?;
        browser.session = session["sessionId"].as_str().ok_or("chromedriver gave no session")?.to_owned();
        let limits =
            json!({ "script": PATIENCE.as_millis() as u64, "pageLoad": PATIENCE.as_millis() as u64 });
        browser.ask("timeouts", &limits)?;
        Ok(browser)
    }

    /// Opens an address.
    pub fn open(&mut self, address: &str) -> Result<(), String> {
        self.ask("url", &json!({ "url": address })).map(drop)
    }

    /// Runs a function body in the page; what it returns.
    pub fn run(&mut self, script: &str) -> Result<Value, String> {
        self.ask("execute/sync", &json!({ "script": script, "args": [] }))
    }

    /// Runs a function body until it gives something that is not null.
    pub fn wait(&mut self, script: &str) -> Result<Value, String> {
        let started = Instant::now();
        loop {
            match self.run(script)? {
                Value::Null if started.elapsed() > PATIENCE => {
                    return Err(format!("still nothing after {} s: {script}", PATIENCE.as_secs()));
                }
                Value::Null => std::thread::sleep(Duration::from_millis(50)),
                value => return Ok(value),
            }
        }
    }

    /// Shows the page as a screen of so many points does.
    pub fn resize(&mut self, width: u32, height: u32, mobile: bool) -> Result<(), String> {
        let screen = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile });
        let command = json!({ "cmd": "Emulation.setDeviceMetricsOverride", "params": screen });
        self.ask("goog/cdp/execute", &command).map(drop)
    }

    /// A picture of the window, as PNG.
    pub fn screenshot(&mut self, file: &Path) -> Result<(), String> {
        let path = format!("/session/{}/screenshot", self.session);
        let text = self.request("GET", &path, "")?;
        let bytes = text.as_str().and_then(decoded).ok_or("the screenshot is no base64")?;
        std::fs::write(file, bytes).map_err(|error| format!("{}: {error}", file.display()))
    }

    fn ask(&mut self, command: &str, body: &Value) -> Result<Value, String> {
        self.post(&format!("/session/{}/{command}", self.session), body)
    }

    fn post(&self, path: &str, body: &Value) -> Result<Value, String> {
        self.request("POST", path, &body.to_string())
    }

    fn request(&self, method: &str, path: &str, body: &str) -> Result<Value, String> {
        let failed = |error: std::io::Error| format!("chromedriver, {path}: {error}");
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).map_err(failed)?;
        stream.set_read_timeout(Some(2 * PATIENCE)).map_err(failed)?;
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body.as_bytes())).map_err(failed)?;
        let mut reader = BufReader::new(stream);
        let (mut line, mut length) = (String::new(), 0);
        loop {
            line.clear();
            if reader.read_line(&mut line).map_err(failed)? <= 2 {
                break;
            }
            if let Some((name, value)) = line.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = value.trim().parse().unwrap_or(0);
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).map_err(failed)?;
        let mut answer: Value =
            serde_json::from_slice(&body).map_err(|error| format!("chromedriver, {path}: {error}"))?;
        match answer["value"]["error"].as_str() {
            Some(error) => {
                Err(format!("{error}: {}", answer["value"]["message"].as_str().unwrap_or_default()))
            }
            None => Ok(answer["value"].take()),
        }
    }
}

impl Drop for Browser {
    /// Ends the browser with its server, and removes its profile. What fails here has nobody to be told.
    fn drop(&mut self) {
        if !self.session.is_empty() {
            let _ = self.request("DELETE", &format!("/session/{}", self.session), "");
        }
        let _ = self.driver.kill();
        let _ = self.driver.wait();
        let _ = std::fs::remove_dir_all(&self.profile);
    }
}

fn free_port() -> Result<u16, String> {
    let bound = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr());
    bound.map(|address| address.port()).map_err(|error| format!("no port is free: {error}"))
}

/// The bytes of base64 text.
fn decoded(text: &str) -> Option<Vec<u8>> {
    let value = |c: u8| match c {
        b'A'..=b'Z' => Some(c - b'A'),
        b'a'..=b'z' => Some(c - b'a' + 26),
        b'0'..=b'9' => Some(c - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    for group in text.trim_end_matches('=').as_bytes().chunks(4) {
        let mut word = 0u32;
        for &c in group {
            word = (word << 6) | u32::from(value(c)?);
        }
        word <<= 6 * (4 - group.len());
        bytes.extend_from_slice(&word.to_be_bytes()[1..group.len()]);
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_gives_its_bytes_or_nothing() {
        assert_eq!(decoded("").as_deref(), Some(&b""[..]));
        assert_eq!(decoded("TQ==").as_deref(), Some(&b"M"[..]));
        assert_eq!(decoded("TWE=").as_deref(), Some(&b"Ma"[..]));
        assert_eq!(decoded("TWFu+/8A").as_deref(), Some(&b"Man\xfb\xff\0"[..]));
        assert_eq!(decoded("TW-u"), None);
    }
}
