//! The description of this process: service name and version, detected facts, and attributes given by the user.
//!
//! Precedence, lowest first: detectors, Kubernetes variables, OTEL_RESOURCE_ATTRIBUTES, OTEL_SERVICE_NAME. A fact that
//! cannot be read is left out, so nothing here fails.

use crate::{env::ResourceSettings, redact::redact_arguments};
use opentelemetry::{Array, KeyValue, StringValue, Value};
use opentelemetry_sdk::{
    Resource,
    resource::{ResourceDetector, TelemetryResourceDetector},
};
use std::fs;

/// The names that OTEL_RESOURCE_DETECTORS accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Detector {
    TelemetrySdk,
    Host,
    HostId,
    OsType,
    OsDescription,
    ProcessPid,
    ProcessExecutableName,
    ProcessExecutablePath,
    ProcessCommandArgs,
    ProcessOwner,
    ProcessRuntimeName,
    ProcessRuntimeVersion,
    ProcessRuntimeDescription,
    Container,
}

use Detector::*;

const NAMES: [(&str, &[Detector]); 16] = [
    ("telemetry.sdk", &[TelemetrySdk]),
    ("host", &[Host]),
    ("host.id", &[HostId]),
    ("os.type", &[OsType]),
    ("os.description", &[OsDescription]),
    ("process.pid", &[ProcessPid]),
    ("process.executable.name", &[ProcessExecutableName]),
    ("process.executable.path", &[ProcessExecutablePath]),
    ("process.command_args", &[ProcessCommandArgs]),
    ("process.owner", &[ProcessOwner]),
    ("process.runtime.name", &[ProcessRuntimeName]),
    ("process.runtime.version", &[ProcessRuntimeVersion]),
    ("process.runtime.description", &[ProcessRuntimeDescription]),
    ("container", &[Container]),
    ("os", &[OsType, OsDescription]),
    (
        "process",
        &[
            ProcessPid,
            ProcessExecutableName,
            ProcessExecutablePath,
            ProcessCommandArgs,
            ProcessOwner,
            ProcessRuntimeName,
            ProcessRuntimeVersion,
            ProcessRuntimeDescription,
        ],
    ),
];

/// The oldest compiler that builds this crate. The one that was used is not known at run time.
const RUST: &str = env!("CARGO_PKG_RUST_VERSION");

impl Detector {
    /// The detectors behind a name, which may be a group.
    pub(crate) fn named(name: &str) -> Option<&'static [Detector]> {
        NAMES.iter().find(|(n, _)| *n == name).map(|(_, detectors)| *detectors)
    }

    /// The expected values, for a message.
    pub(crate) fn expected() -> String {
        let names: Vec<_> = NAMES.iter().map(|(n, _)| *n).collect();
        format!("a comma-separated list of {}", names.join(", "))
    }

    fn detect(self) -> Vec<KeyValue> {
        match self {
            TelemetrySdk => TelemetryResourceDetector
                .detect()
                .iter()
                .map(|(k, v)| KeyValue::new(k.clone(), v.clone()))
                .collect(),
            Host => {
                let arch = match std::env::consts::ARCH {
                    "x86_64" => "amd64",
                    "aarch64" => "arm64",
                    other => other,
                };
                let mut found = one("host.name", line("/proc/sys/kernel/hostname"));
                found.push(KeyValue::new("host.arch", arch));
                found
            }
            HostId => {
                let id = line("/etc/machine-id").or_else(|| line("/var/lib/dbus/machine-id"));
                one("host.id", id)
            }
            OsType => one("os.type", Some(std::env::consts::OS.to_owned())),
            OsDescription => one("os.description", os_description()),
            ProcessPid => vec![KeyValue::new("process.pid", i64::from(std::process::id()))],
            ProcessExecutableName => one("process.executable.name", executable(true)),
            ProcessExecutablePath => one("process.executable.path", executable(false)),
            ProcessCommandArgs => vec![command_args()],
            ProcessOwner => one("process.owner", owner()),
            ProcessRuntimeName => one("process.runtime.name", Some("rust".into())),
            ProcessRuntimeVersion => one("process.runtime.version", Some(RUST.into())),
            ProcessRuntimeDescription => {
                one("process.runtime.description", Some(format!("rust {RUST} or newer, tokio")))
            }
            Container => one("container.id", container_id()),
        }
    }
}

fn one(key: &'static str, value: Option<String>) -> Vec<KeyValue> {
    value.map(|v| KeyValue::new(key, v)).into_iter().collect()
}

fn line(file: &str) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    Some(text.trim().to_owned()).filter(|t| !t.is_empty())
}

fn executable(name_only: bool) -> Option<String> {
    let path = std::env::current_exe().ok()?;
    let part = if name_only { path.file_name()? } else { path.as_os_str() };
    Some(part.to_string_lossy().into_owned())
}

fn command_args() -> KeyValue {
    let words = std::env::args_os().map(|a| a.to_string_lossy().into_owned());
    let shown: Vec<StringValue> = redact_arguments(words).into_iter().map(Into::into).collect();
    KeyValue::new("process.command_args", Value::Array(Array::String(shown)))
}

fn os_description() -> Option<String> {
    let release = fs::read_to_string("/etc/os-release").ok();
    let pretty = release.as_deref().and_then(|text| {
        let value = text.lines().find_map(|l| l.strip_prefix("PRETTY_NAME="))?;
        Some(value.trim_matches('"').to_owned())
    });
    let kernel = line("/proc/sys/kernel/osrelease").map(|k| format!("Linux {k}"));
    let parts: Vec<_> = pretty.into_iter().chain(kernel).collect();
    (!parts.is_empty()).then(|| parts.join(", "))
}

/// The user's name from /etc/passwd, or else the number.
fn owner() -> Option<String> {
    let uid = rustix::process::geteuid().as_raw().to_string();
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let name = passwd.lines().find_map(|l| {
        let mut fields = l.split(':');
        let (name, id) = (fields.next()?, fields.nth(1)?);
        (id == uid).then(|| name.to_owned())
    });
    name.or(Some(uid))
}

fn container_id() -> Option<String> {
    // cgroup v1 has the container's id in the control group, v2 only in the mounts.
    let text = fs::read_to_string("/proc/self/cgroup").ok()?;
    container_id_in(&text)
        .or_else(|| container_id_in(&fs::read_to_string("/proc/self/mountinfo").ok()?))
}

fn container_id_in(text: &str) -> Option<String> {
    text.lines()
        .filter(|l| {
            l.contains("docker")
                || l.contains("containers")
                || l.contains("kubepods")
                || l.contains("crio")
        })
        .flat_map(|l| l.split(|c: char| !c.is_ascii_alphanumeric()))
        .find(|word| word.len() == 64 && word.bytes().all(|b| b.is_ascii_hexdigit()))
        .map(str::to_owned)
}

/// Builds the resource. `service` and `version` are the defaults.
pub(crate) fn build(settings: &ResourceSettings, service: &str, version: &str) -> Resource {
    let mut all = vec![
        KeyValue::new("service.name", service.to_owned()),
        KeyValue::new("service.version", version.to_owned()),
    ];
    all.extend(TelemetrySdk.detect());
    all.extend(settings.detectors.iter().flat_map(|d| d.detect()));
    all.extend(settings.kubernetes.iter().map(|(k, v)| KeyValue::new(*k, v.clone())));
    all.extend(settings.attributes.iter().map(|(k, v)| KeyValue::new(k.clone(), v.clone())));
    all.extend(one("service.name", settings.service_name.clone()));
    // A later value wins in the builder.
    Resource::builder_empty().with_attributes(all).build()
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry::Key;

    fn text(resource: &Resource, key: &'static str) -> Option<String> {
        resource.get(&Key::from_static_str(key)).map(|v| v.to_string())
    }

    #[test]
    fn the_stronger_source_wins() {
        let mut settings = ResourceSettings {
            attributes: vec![
                ("service.name".into(), "from attributes".into()),
                ("k8s.pod.name".into(), "given".into()),
            ],
            kubernetes: vec![("k8s.pod.name", "weak".into()), ("k8s.namespace.name", "ns".into())],
            ..Default::default()
        };
        let built = build(&settings, "klio", "1.2");
        assert_eq!(text(&built, "service.name").as_deref(), Some("from attributes"));
        assert_eq!(text(&built, "service.version").as_deref(), Some("1.2"));
        assert_eq!(text(&built, "k8s.pod.name").as_deref(), Some("given"));
        assert_eq!(text(&built, "k8s.namespace.name").as_deref(), Some("ns"));
        assert_eq!(text(&built, "k8s.container.name"), None);
        settings.service_name = Some("mine".into());
        assert_eq!(text(&build(&settings, "klio", "1.2"), "service.name").as_deref(), Some("mine"));
    }

    #[test]
    fn every_detector_finds_something_or_nothing_but_never_fails() {
        let all: Vec<Detector> = NAMES.iter().flat_map(|(_, d)| d.iter().copied()).collect();
        let settings = ResourceSettings { detectors: all, ..Default::default() };
        let built = build(&settings, "klio", "1");
        assert_eq!(text(&built, "process.pid"), Some(std::process::id().to_string()));
        assert_eq!(text(&built, "os.type").as_deref(), Some("linux"));
        assert_eq!(text(&built, "telemetry.sdk.language").as_deref(), Some("rust"));
        assert!(text(&built, "process.owner").is_some());
        assert!(text(&built, "host.name").is_some());
    }

    #[test]
    fn a_container_id_is_found_in_both_kinds_of_file() {
        let id = "0123456789abcdef".repeat(4);
        let v1 = format!("12:cpu:/docker/{id}\n");
        let v2 = format!("1 2 0:1 /var/lib/docker/containers/{id}/hostname /etc/hostname rw\n");
        assert_eq!(container_id_in(&v1), Some(id.clone()));
        assert_eq!(container_id_in(&v2), Some(id));
        assert_eq!(container_id_in("0::/\n"), None);
    }
}
