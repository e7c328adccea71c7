//! Files of folders, served to browsers of this machine.

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

/// A server; it ends with the process.
pub struct Site {
    port: u16,
    thread: JoinHandle<()>,
}

impl Site {
    /// Serves folders, or single files, under the paths given, the first that fits; port 0 takes a free one.
    pub fn open(folders: Vec<(String, PathBuf)>, port: u16) -> Result<Site, String> {
        let refused = |error: std::io::Error| format!("port {port} cannot be opened: {error}");
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).map_err(refused)?;
        let port = listener.local_addr().map_err(refused)?.port();
        let folders = Arc::new(folders);
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let folders = Arc::clone(&folders);
                // A browser that goes away in mid-answer is no fault of the server.
                std::thread::spawn(move || answer(&stream, &folders).ok());
            }
        });
        Ok(Site { port, thread })
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Serves until the process is ended.
    pub fn wait(self) {
        let _ = self.thread.join();
    }
}

fn answer(stream: &TcpStream, folders: &[(String, PathBuf)]) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let mut line = String::new();
    while reader.read_line(&mut line)? > 2 {
        line.clear();
    }
    let mut words = request.split_whitespace();
    let (method, target) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
    let found = file_of(target, folders).and_then(|path| Some((std::fs::read(&path).ok()?, kind(&path))));
    let (status, content, kind) = match found {
        Some((content, kind)) if method == "GET" => ("200 OK", content, kind),
        Some(_) => ("405 Method Not Allowed", Vec::new(), "text/plain"),
        None => ("404 Not Found", b"no such file\n".to_vec(), "text/plain"),
    };
    let mut stream = stream;
    let length = content.len();
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n"
    )?;
    stream.write_all(&content)
}

/// The file that a request names; never one outside its folder.
fn file_of(target: &str, folders: &[(String, PathBuf)]) -> Option<PathBuf> {
    let path = target.split(['?', '#']).next()?;
    let path = if path == "/" { "/index.html" } else { path };
    let (prefix, folder) = folders.iter().find(|(prefix, _)| path.starts_with(prefix.as_str()))?;
    let inside = Path::new(&path[prefix.len()..]);
    let plain = inside.components().all(|part| matches!(part, Component::Normal(_)));
    let whole = inside.as_os_str().is_empty();
    plain.then(|| if whole { folder.clone() } else { folder.join(inside) })
}

fn kind(path: &Path) -> &'static str {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("html") => "text/html; charset=utf-8",
        Some("js") => "text/javascript; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("json") => "application/json",
        Some("wasm") => "application/wasm",
        _ => "application/octet-stream",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_request_reaches_files_of_its_folder_only() {
        let folders = [("/models/a/".to_owned(), PathBuf::from("/m")), ("/".to_owned(), PathBuf::from("/w"))];
        let file = |target| file_of(target, &folders);
        assert_eq!(file("/"), Some(PathBuf::from("/w/index.html")));
        assert_eq!(file("/page.js?x=1"), Some(PathBuf::from("/w/page.js")));
        assert_eq!(file("/models/a/1_Pooling/config.json"), Some(PathBuf::from("/m/1_Pooling/config.json")));
        assert_eq!(file("/../etc/passwd"), None);
        assert_eq!(file("/models/a/../../etc/passwd"), None);
        assert_eq!(file("/models/a//etc/passwd"), None);
        assert_eq!(file("no-path"), None);
        assert_eq!(file("/models/a/"), Some(PathBuf::from("/m")));
    }

    #[test]
    fn a_file_comes_with_its_kind_and_length_and_an_absent_one_is_404() {
        let folder = std::env::temp_dir().join(format!("rlx-xtask-site-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("a.wasm"), b"\0asm").unwrap();
        let site = Site::open(vec![("/".to_owned(), folder.clone())], 0).unwrap();
        let get = |path: &str| {
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, site.port())).unwrap();
            write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            text
        };
        let found = get("/a.wasm");
        assert!(
            found.starts_with("HTTP/1.1 200 OK\r\nContent-Type: application/wasm\r\nContent-Length: 4\r\n")
        );
        assert!(found.ends_with("\r\n\r\n\0asm"), "{found:?}");
        assert!(get("/b.wasm").starts_with("HTTP/1.1 404 "));
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
