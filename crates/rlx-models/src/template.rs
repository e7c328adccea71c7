//! Chat templates: Jinja as `tokenizer_config.json` or `chat_template.jinja` holds it, with bounded time and output.

use crate::error::{ModelError, Result};
use minijinja::value::{Kwargs, Rest, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, UndefinedBehavior};
use rlx::import::hf::{ConfigReader, HfFolder};
use rlx::import::json::Json;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Largest text a template may write, in bytes.
pub const MAX_RENDERED_BYTES: usize = 16 << 20;
/// Most steps a template may take.
pub const MAX_STEPS: u64 = 20_000_000;
/// Largest template that is read, in bytes.
pub const MAX_TEMPLATE_BYTES: u64 = 4 << 20;

/// A chat template as a file of its own.
pub(crate) const TEMPLATE_FILE: &str = "chat_template.jinja";

const NAME: &str = "chat";
const TOKENS: &[&str] =
    &["bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token"];

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// The text.
    pub content: String,
}

/// A chat template, compiled.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    tokens: BTreeMap<String, String>,
    path: PathBuf,
}

impl ChatTemplate {
    /// The template of a folder: `chat_template.jinja` if there is one, else `chat_template` of `tokenizer_config.json` (of
    /// several, the one named `default`).
    ///
    /// # Errors
    /// [`ModelError::NoTemplate`], [`ModelError::Template`], [`ModelError::Import`].
    pub fn open(folder: &HfFolder) -> Result<Self> {
        let config = folder.tokenizer_config()?;
        let tokens = config.as_ref().map(special_tokens).transpose()?.unwrap_or_default();
        let path = folder.root().join(TEMPLATE_FILE);
        if let Some(source) = folder.content(TEMPLATE_FILE) {
            return Self::new(&String::from_utf8_lossy(source), tokens, &path);
        }
        if path.is_file() {
            let source = read_source(&path)?;
            return Self::new(&source, tokens, &path);
        }
        let path = folder.root().join("tokenizer_config.json");
        let source = match &config {
            Some(config) => default_template(config)?,
            None => None,
        };
        match source {
            Some(source) => Self::new(&source, tokens, &path),
            None => Err(ModelError::NoTemplate { path }),
        }
    }

    /// Compiles a template; `path` names its file in messages.
    ///
    /// # Errors
    /// [`ModelError::Template`] with the line.
    pub fn new(source: &str, tokens: BTreeMap<String, String>, path: &Path) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_fuel(Some(MAX_STEPS));
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.add_function("raise_exception", |reason: String| -> std::result::Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, reason))
        });
        environment.add_filter("tojson", to_json);
        environment.set_unknown_method_callback(python_method);
        environment.add_template_owned(NAME, source.to_owned()).map_err(|error| fault(path, &error))?;
        Ok(Self { environment, tokens, path: path.to_path_buf() })
    }

    /// The text of a conversation; `add_generation_prompt` ends it where the model's answer begins.
    ///
    /// # Errors
    /// [`ModelError::Template`]: the template refuses the messages, fails, runs too long or writes too much.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let entry = |m: &Message| {
            Value::from_iter([
                ("role", Value::from(m.role.clone())),
                ("content", Value::from(m.content.clone())),
            ])
        };
        let mut context: BTreeMap<&str, Value> =
            self.tokens.iter().map(|(name, text)| (name.as_str(), Value::from(text.clone()))).collect();
        context.insert("messages", messages.iter().map(entry).collect());
        context.insert("add_generation_prompt", Value::from(add_generation_prompt));
        context.insert("tools", Value::from(()));
        context.insert("documents", Value::from(()));
        let template = self.environment.get_template(NAME).map_err(|error| fault(&self.path, &error))?;
        let mut output = Bounded { bytes: Vec::new() };
        template.render_captured_to(context, &mut output).map_err(|error| fault(&self.path, &error))?;
        String::from_utf8(output.bytes).map_err(|error| {
            let reason = error.to_string();
            ModelError::Template { path: self.path.clone(), line: 0, reason }
        })
    }
}

struct Bounded {
    bytes: Vec<u8>,
}

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > MAX_RENDERED_BYTES {
            return Err(io::Error::other(format!("it writes more than {MAX_RENDERED_BYTES} bytes")));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn fault(path: &Path, error: &Error) -> ModelError {
    let cause = std::error::Error::source(error).map(|cause| cause.to_string());
    let reason = match (error.kind(), error.detail(), cause) {
        (ErrorKind::OutOfFuel, ..) => format!("it takes more than {MAX_STEPS} steps"),
        (_, _, Some(cause)) => cause,
        (_, Some(detail), None) => detail.to_owned(),
        (kind, None, None) => kind.to_string(),
    };
    ModelError::Template { path: path.to_path_buf(), line: error.line().unwrap_or(0), reason }
}

fn read_source(path: &Path) -> Result<String> {
    let wrong = |reason: String| ModelError::Template { path: path.to_path_buf(), line: 0, reason };
    let metadata = std::fs::metadata(path).map_err(|error| wrong(error.to_string()))?;
    if metadata.len() > MAX_TEMPLATE_BYTES {
        return Err(wrong(format!("{} bytes, expected at most {MAX_TEMPLATE_BYTES}", metadata.len())));
    }
    std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))
}

fn special_tokens(config: &ConfigReader) -> Result<BTreeMap<String, String>> {
    let mut tokens = BTreeMap::new();
    for name in TOKENS {
        let text = match config.optional::<Json>(name)? {
            Some(Json::String(text)) => text,
            Some(object @ Json::Object(_)) => match object.field("content") {
                Some(Json::String(text)) => text.clone(),
                _ => {
                    return Err(config
                        .wrong(name, "a string, or an object with `content`", object.brief(80))
                        .into());
                }
            },
            _ => continue,
        };
        tokens.insert((*name).to_owned(), text);
    }
    Ok(tokens)
}

fn default_template(config: &ConfigReader) -> Result<Option<String>> {
    let found = match config.optional::<Json>("chat_template")? {
        None => return Ok(None),
        Some(Json::String(source)) => return Ok(Some(source)),
        Some(found) => found,
    };
    if let Json::Array(entries) = &found {
        let named =
            |entry: &&Json| matches!(entry.field("name"), Some(Json::String(name)) if name == "default");
        if let Some(Json::String(source)) =
            entries.iter().find(named).and_then(|entry| entry.field("template"))
        {
            return Ok(Some(source.clone()));
        }
    }
    let expected = "a template, or a list with one named \"default\"";
    Err(config.wrong("chat_template", expected, found.brief(80)).into())
}

/// JSON as Python's `json.dumps` spaces it, which is what templates were trained with.
fn to_json(value: &Value, kwargs: Kwargs) -> std::result::Result<Value, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let _: Option<bool> = kwargs.get("ensure_ascii")?;
    kwargs.assert_all_used()?;
    let json = serde_json::to_value(value)
        .map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    let mut text = String::new();
    write_json(&json, indent, 0, &mut text);
    Ok(Value::from_safe_string(text))
}

fn write_json(json: &serde_json::Value, indent: Option<usize>, depth: usize, out: &mut String) {
    use serde_json::Value as J;
    let new_line = |out: &mut String, depth: usize| {
        if let Some(width) = indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', width * depth));
        }
    };
    let comma = if indent.is_some() { "," } else { ", " };
    let (open, close, empty) = match json {
        J::Array(items) => ('[', ']', items.is_empty()),
        J::Object(fields) => ('{', '}', fields.is_empty()),
        other => return out.push_str(&other.to_string()),
    };
    out.push(open);
    let mut first = true;
    let mut separate = |out: &mut String| {
        if !std::mem::take(&mut first) {
            out.push_str(comma);
        }
        new_line(out, depth + 1);
    };
    match json {
        J::Array(items) => items.iter().for_each(|item| {
            separate(out);
            write_json(item, indent, depth + 1, out);
        }),
        J::Object(fields) => fields.iter().for_each(|(name, item)| {
            separate(out);
            out.push_str(&J::from(name.as_str()).to_string());
            out.push_str(": ");
            write_json(item, indent, depth + 1, out);
        }),
        _ => {}
    }
    if !empty {
        new_line(out, depth);
    }
    out.push(close);
}

/// The methods of Python's strings and dicts that templates call.
fn python_method(
    state: &State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> std::result::Result<Value, Error> {
    if let Some(text) = value.as_str() {
        return string_method(text, method, args);
    }
    if value.kind() == ValueKind::Map {
        return match method {
            "items" => state.apply_filter("items", std::slice::from_ref(value)),
            "keys" => state.apply_filter("list", std::slice::from_ref(value)),
            "values" => value.try_iter()?.map(|key| value.get_item(&key)).collect(),
            "get" => {
                let (key, default): (Value, Option<Value>) = minijinja::value::from_args(args)?;
                let found = value.get_item(&key)?;
                Ok(if found.is_undefined() { default.unwrap_or_else(|| Value::from(())) } else { found })
            }
            _ => Err(Error::from(ErrorKind::UnknownMethod)),
        };
    }
    Err(Error::from(ErrorKind::UnknownMethod))
}

fn string_method(text: &str, method: &str, args: &[Value]) -> std::result::Result<Value, Error> {
    let Rest::<Value>(values) = minijinja::value::from_args::<(Rest<Value>,)>(args)?.0;
    let argument = |i: usize| values.get(i).and_then(|v| v.as_str());
    let cut = |c: char| argument(0).map_or_else(|| c.is_whitespace(), |set| set.contains(c));
    Ok(match (method, values.len()) {
        ("strip", 0 | 1) => Value::from(text.trim_matches(cut)),
        ("lstrip", 0 | 1) => Value::from(text.trim_start_matches(cut)),
        ("rstrip", 0 | 1) => Value::from(text.trim_end_matches(cut)),
        ("upper", 0) => Value::from(text.to_uppercase()),
        ("lower", 0) => Value::from(text.to_lowercase()),
        ("split", 0) => text.split_whitespace().map(Value::from).collect(),
        _ => {
            let Some(pattern) = argument(0) else { return Err(Error::from(ErrorKind::UnknownMethod)) };
            let limit = values.get(1).and_then(|v| usize::try_from(v.clone()).ok());
            match (method, values.len()) {
                ("startswith", 1) => Value::from(text.starts_with(pattern)),
                ("endswith", 1) => Value::from(text.ends_with(pattern)),
                ("find", 1) => match text.find(pattern) {
                    Some(at) => Value::from(text[..at].chars().count()),
                    None => Value::from(-1),
                },
                ("replace", 2) => match argument(1) {
                    Some(to) => Value::from(text.replace(pattern, to)),
                    None => return Err(Error::from(ErrorKind::UnknownMethod)),
                },
                ("split", 1) if !pattern.is_empty() => text.split(pattern).map(Value::from).collect(),
                ("split", 2) if !pattern.is_empty() => match limit {
                    Some(limit) => text.splitn(limit.saturating_add(1), pattern).map(Value::from).collect(),
                    None => text.split(pattern).map(Value::from).collect(),
                },
                _ => return Err(Error::from(ErrorKind::UnknownMethod)),
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str) -> Result<String> {
        let tokens = BTreeMap::from([("bos_token".to_owned(), "<s>".to_owned())]);
        let template = ChatTemplate::new(source, tokens, Path::new("m/tokenizer_config.json"))?;
        let message = |role: &str, content: &str| Message { role: role.into(), content: content.into() };
        template.render(&[message("system", "Be <kind>."), message("user", " a,b ")], true)
    }

    #[test]
    fn messages_tokens_and_python_methods() {
        let source = "{{ bos_token }}{% for m in messages %}\n  {% if m.role.startswith('u') %}\n[{{ m['content'].strip().split(',')[-1] }}]\
                      {% else %}\n{{ m.content.upper() }}|{{ m.get('name', 'none') }}|\n{% endif %}\n{% endfor %}";
        assert_eq!(render(source).unwrap(), "<s>BE <KIND>.|none|\n[b]");
    }

    #[test]
    fn json_is_spaced_as_python_spaces_it() {
        assert_eq!(render("{{ messages[1] | tojson }}").unwrap(), r#"{"role": "user", "content": " a,b "}"#);
        assert_eq!(render("{{ [1, {}] | tojson(indent=2) }}").unwrap(), "[\n  1,\n  {}\n]");
    }

    #[test]
    fn a_refusal_and_a_fault_name_their_line() {
        let refusal = render("line\n{{ raise_exception('roles must alternate') }}").unwrap_err();
        assert_eq!(
            refusal.to_string(),
            "m/tokenizer_config.json: chat template, line 2: roles must alternate"
        );
        assert!(matches!(render("a\nb\n{% if %}").unwrap_err(), ModelError::Template { line: 3, .. }));
        assert!(matches!(
            render("{{ unknown_function() }}").unwrap_err(),
            ModelError::Template { line: 1, .. }
        ));
    }

    #[test]
    fn an_endless_template_and_an_endless_text_end() {
        let loops =
            "{% for a in range(9999) %}{% for b in range(9999) %}{% set c = a * b %}{% endfor %}{% endfor %}";
        let error = render(loops).unwrap_err().to_string();
        assert!(error.contains("steps"), "{error}");
        let writes = "{% for a in range(9999) %}{{ 'x' * 99999 }}{% endfor %}";
        let error = render(writes).unwrap_err().to_string();
        assert!(error.contains("writes more than"), "{error}");
    }
}
