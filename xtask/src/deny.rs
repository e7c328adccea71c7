//! `cargo xtask deny`: what dependencies may be, against the reviewed list `xtask/deny.txt`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::Value;

use crate::config::Config;
use crate::process;

const FILE: &str = "xtask/deny.txt";
/// Build dependencies that compile or look for native code.
const NATIVE_BUILDERS: &[&str] = &["bindgen", "cc", "cmake", "pkg-config", "vcpkg"];
/// Duplicates are counted on the platform that CI builds for.
const PLATFORM: &str = "x86_64-unknown-linux-gnu";

/// Checks every dependency of every platform and feature of the workspace.
pub fn run(config: &Config, args: &[String]) -> Result<(), String> {
    if let Some(unknown) = args.first() {
        return Err(format!("deny takes no argument `{unknown}`"));
    }
    let text =
        std::fs::read_to_string(config.root.join(FILE)).map_err(|e| format!("cannot read {FILE}: {e}"))?;
    let rules = Rules::parse(&text)?;
    let packages = packages(&metadata(&config.root, &["--all-features"])?)?;
    let built = packages_of_nodes(&metadata(&config.root, &["--filter-platform", PLATFORM])?)?;
    let findings = rules.check(&packages, &built);
    findings.iter().for_each(|finding| println!("deny: {finding}"));
    for line in rules.unused(&packages, &built) {
        println!("note: `{line}` in {FILE} covers nothing");
    }
    println!("deny: {} packages, {} built on {PLATFORM}", packages.len(), built.len());
    if findings.is_empty() { Ok(()) } else { Err(format!("deny: {} findings", findings.len())) }
}

fn metadata(root: &Path, extra: &[&str]) -> Result<Value, String> {
    let mut command = process::command("cargo", &["metadata", "--format-version", "1", "--locked"], root);
    let text = process::capture(command.args(extra))?;
    serde_json::from_str(&text).map_err(|e| format!("cargo metadata does not parse: {e}"))
}

#[derive(Default)]
struct Package {
    name: String,
    version: String,
    licence: String,
    /// None for the workspace's own.
    source: Option<String>,
    /// Why it counts as native code, if it does.
    native: Option<String>,
}

fn packages(metadata: &Value) -> Result<Vec<Package>, String> {
    let list = metadata["packages"].as_array().ok_or("cargo metadata lists no packages")?;
    let word = |value: &Value| value.as_str().unwrap_or_default().to_string();
    let read = |package: &Value| Package {
        name: word(&package["name"]),
        version: word(&package["version"]),
        licence: word(&package["license"]),
        source: package["source"].as_str().map(String::from),
        native: native_reason(package),
    };
    Ok(list.iter().map(read).collect())
}

fn native_reason(package: &Value) -> Option<String> {
    if let Some(library) = package["links"].as_str() {
        return Some(format!("links `{library}`"));
    }
    let dependencies = package["dependencies"].as_array()?;
    let builders = dependencies.iter().filter(|d| d["kind"] == "build" && d["optional"] != true);
    let mut names = builders.filter_map(|dependency| dependency["name"].as_str());
    names.find(|name| NATIVE_BUILDERS.contains(name)).map(|name| format!("builds with `{name}`"))
}

/// The (name, version) of each node of the resolved graph.
fn packages_of_nodes(metadata: &Value) -> Result<BTreeSet<(String, String)>, String> {
    let nodes = metadata["resolve"]["nodes"].as_array().ok_or("cargo metadata resolves nothing")?;
    let used: BTreeSet<&str> = nodes.iter().filter_map(|node| node["id"].as_str()).collect();
    let list = metadata["packages"].as_array().ok_or("cargo metadata lists no packages")?;
    let inside = list.iter().filter(|package| package["id"].as_str().is_some_and(|id| used.contains(id)));
    let pair =
        |package: &Value| Some((package["name"].as_str()?.into(), package["version"].as_str()?.into()));
    Ok(inside.filter_map(pair).collect())
}

/// The reviewed list: `licence ID`, `native CRATE reason`, `duplicate CRATE reason`, `ban CRATE reason`.
#[derive(Default)]
struct Rules {
    licences: BTreeSet<String>,
    native: BTreeSet<String>,
    duplicates: BTreeSet<String>,
    banned: BTreeMap<String, String>,
}

impl Rules {
    fn parse(text: &str) -> Result<Rules, String> {
        let mut rules = Rules::default();
        for (at, line) in text.lines().enumerate() {
            let mut words = line.split_whitespace();
            let Some(kind) = words.next().filter(|word| !word.starts_with('#')) else { continue };
            let name = words.next().unwrap_or_default().to_string();
            let reason = words.collect::<Vec<_>>().join(" ");
            if name.is_empty() || (kind != "licence" && reason.is_empty()) {
                return Err(format!("{FILE}:{}: `{line}` lacks a name or a reason", at + 1));
            }
            match kind {
                "licence" => drop(rules.licences.insert(name)),
                "native" => drop(rules.native.insert(name)),
                "duplicate" => drop(rules.duplicates.insert(name)),
                "ban" => drop(rules.banned.insert(name, reason)),
                _ => return Err(format!("{FILE}:{}: unknown kind `{kind}`", at + 1)),
            }
        }
        Ok(rules)
    }

    fn check(&self, packages: &[Package], built: &BTreeSet<(String, String)>) -> Vec<String> {
        let mut findings = Vec::new();
        let foreign = packages.iter().filter_map(|package| Some((package, package.source.as_deref()?)));
        let registry =
            packages.iter().filter_map(|p| p.source.as_deref()).find(|s| s.starts_with("registry+"));
        for (Package { name, version, licence, native, .. }, source) in foreign {
            if Some(source) != registry {
                findings
                    .push(format!("{name} {version}: source `{source}` is not the registry of the others"));
            }
            if !licence_allows(licence, &self.licences) {
                findings.push(format!("{name} {version}: licence `{licence}` is not in {FILE}"));
            }
            if let Some(reason) = self.banned.get(name) {
                findings.push(format!("{name} {version}: banned: {reason}"));
            }
            if let Some(reason) = native.as_ref().filter(|_| !self.native.contains(name)) {
                findings.push(format!("{name} {version}: native code ({reason}) without a line in {FILE}"));
            }
        }
        let duplicates = duplicates(built);
        for (name, versions) in duplicates.iter().filter(|(name, _)| !self.duplicates.contains(**name)) {
            findings.push(format!("{name}: built in versions {}", versions.join(", ")));
        }
        findings
    }

    /// Lines of the list that cover nothing (a dependency may be gone, or not here yet).
    fn unused(&self, packages: &[Package], built: &BTreeSet<(String, String)>) -> Vec<String> {
        let duplicates = duplicates(built);
        let is_native = |name: &str| packages.iter().any(|p| p.name == name && p.native.is_some());
        let native = self.native.iter().filter(|name| !is_native(name)).map(|name| format!("native {name}"));
        let twice = self.duplicates.iter().filter(|name| !duplicates.contains_key(name.as_str()));
        native.chain(twice.map(|name| format!("duplicate {name}"))).collect()
    }
}

fn duplicates(built: &BTreeSet<(String, String)>) -> BTreeMap<&str, Vec<&str>> {
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (name, version) in built {
        versions.entry(name).or_default().push(version);
    }
    versions.retain(|_, versions| versions.len() > 1);
    versions
}

/// Whether an SPDX expression can be met with the allowed licences; `/` is the old spelling of `OR`.
fn licence_allows(expression: &str, allowed: &BTreeSet<String>) -> bool {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    alternatives(&words, &mut at, allowed) == Some(true) && at == words.len()
}

fn alternatives(words: &[&str], at: &mut usize, allowed: &BTreeSet<String>) -> Option<bool> {
    let mut met = conjunction(words, at, allowed)?;
    while words.get(*at) == Some(&"OR") {
        *at += 1;
        met |= conjunction(words, at, allowed)?;
    }
    Some(met)
}

fn conjunction(words: &[&str], at: &mut usize, allowed: &BTreeSet<String>) -> Option<bool> {
    let mut met = licence(words, at, allowed)?;
    while words.get(*at) == Some(&"AND") {
        *at += 1;
        met &= licence(words, at, allowed)?;
    }
    Some(met)
}

fn licence(words: &[&str], at: &mut usize, allowed: &BTreeSet<String>) -> Option<bool> {
    let word = *words.get(*at)?;
    *at += 1;
    if word == "(" {
        let met = alternatives(words, at, allowed)?;
        (words.get(*at) == Some(&")")).then(|| *at += 1)?;
        return Some(met);
    }
    if words.get(*at) == Some(&"WITH") {
        let exception = words.get(*at + 1)?;
        *at += 2;
        return Some(allowed.contains(word) || allowed.contains(&format!("{word}-WITH-{exception}")));
    }
    Some(allowed.contains(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str =
        "# c\nlicence MIT\nlicence Apache-2.0\nnative ring-like reviewed\nban openssl use rustls\n";

    fn package(name: &str, licence: &str) -> Package {
        Package {
            name: name.into(),
            licence: licence.into(),
            source: Some("registry+index".into()),
            ..Package::default()
        }
    }

    fn found(packages: &[Package]) -> Vec<String> {
        let mut rules = Rules::parse(LIST).unwrap();
        rules.native.clear();
        rules.check(packages, &BTreeSet::new())
    }

    #[test]
    fn licence_expressions_are_evaluated() {
        let allowed = Rules::parse(LIST).unwrap().licences;
        for expression in
            ["MIT", "GPL-3.0 OR MIT", "MIT/GPL-3.0", "(MIT OR GPL-3.0) AND Apache-2.0", "MIT WITH X"]
        {
            assert!(licence_allows(expression, &allowed), "{expression}");
        }
        for expression in ["GPL-3.0", "MIT AND GPL-3.0", "", "MIT OR", "(MIT", "MIT Apache-2.0"] {
            assert!(!licence_allows(expression, &allowed), "{expression}");
        }
    }

    #[test]
    fn foreign_sources_licences_and_bans_are_found() {
        assert!(found(&[package("a", "MIT")]).is_empty());
        assert_eq!(found(&[package("a", "GPL-3.0")]).len(), 1);
        assert_eq!(found(&[package("openssl", "MIT")]).len(), 1);
        let git = Package { source: Some("git+https://example.org/a".into()), ..package("a", "MIT") };
        assert_eq!(found(&[git]).len(), 1);
    }

    #[test]
    fn native_code_needs_a_line_and_an_idle_line_is_told() {
        let native = || Package { native: Some("builds with `cc`".into()), ..package("ring-like", "MIT") };
        let rules = Rules::parse(LIST).unwrap();
        assert!(rules.check(&[native()], &BTreeSet::new()).is_empty());
        assert!(rules.unused(&[native()], &BTreeSet::new()).is_empty());
        assert_eq!(found(&[native()]).len(), 1);
        assert_eq!(rules.unused(&[], &BTreeSet::new()), ["native ring-like"]);
    }

    #[test]
    fn native_code_is_read_from_metadata() {
        let build =
            |name: &str, kind: &str| serde_json::json!({"dependencies": [{"name": name, "kind": kind}]});
        assert!(native_reason(&build("cc", "build")).is_some());
        assert!(native_reason(&build("cc", "dev")).is_none());
        assert!(native_reason(&build("autocfg", "build")).is_none());
        assert!(native_reason(&serde_json::json!({"links": "z", "dependencies": []})).is_some());
    }

    #[test]
    fn two_versions_of_a_crate_are_found() {
        let built = [("a", "1.0.0"), ("a", "2.0.0"), ("b", "1.0.0")];
        let built: BTreeSet<_> = built.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect();
        let findings = Rules::parse("licence MIT").unwrap().check(&[], &built);
        assert_eq!(findings, ["a: built in versions 1.0.0, 2.0.0"]);
        assert!(Rules::parse("duplicate a half the tree moves later").unwrap().check(&[], &built).is_empty());
    }

    #[test]
    fn a_line_without_a_reason_is_refused() {
        assert!(Rules::parse("native a").is_err() && Rules::parse("permit a b").is_err());
    }
}
