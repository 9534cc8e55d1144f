//! Which bucket a command reads without a server, and with which options.

use super::Config;
use klio_storage::tier2::Tier2Config;

/// How to reach the bucket of `restore.from`.
///
/// # Errors
/// All problems, one sentence each.
pub fn settings(config: &Config) -> Result<Tier2Config, Vec<String>> {
    let from = config.restore.from.as_str();
    let known = config.tier2.clone().filter(|known| belongs(&known.url, from));
    let mut settings = known.unwrap_or_else(|| Tier2Config::new(from));
    settings.url = from.to_owned();
    let problems: Vec<String> = settings
        .validate()
        .into_iter()
        .map(|problem| problem.replace("tier2.url", "restore.from (--from)"))
        .collect();
    if problems.is_empty() { Ok(settings) } else { Err(problems) }
}

/// Whether options that were made for the bucket `known` may be used with `from`: credentials must not be sent elsewhere.
fn belongs(known: &str, from: &str) -> bool {
    let parts = |text: &str| {
        let url = url::Url::parse(text).ok()?;
        Some((url.scheme().to_owned(), url.host_str().map(str::to_owned)))
    };
    known.is_empty() || parts(known) == parts(from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Config {
        Config::from_layers(Some(text), &[], &[]).unwrap()
    }

    const SERVER_S: &str = "[tier2]\nurl = \"s3://b/p\"\nendpoint = \"http://127.0.0.1:9\"\n\
        access_key_id = \"AK\"\nsecret_access_key = \"hush-hush\"\nupload_memory = 67108864\n";

    #[test]
    fn the_server_s_options_are_used_for_its_bucket_only() {
        let same = config(&format!("[restore]\nfrom = \"s3://b/other\"\n{SERVER_S}"));
        let found = settings(&same).unwrap();
        assert_eq!(found.url, "s3://b/other");
        assert_eq!(found.access_key_id.as_deref(), Some("AK"));
        for other in ["s3://c/p", "file:///srv/copy"] {
            let other = config(&format!("[restore]\nfrom = \"{other}\"\n{SERVER_S}"));
            assert_eq!(settings(&other).unwrap().access_key_id, None);
        }
        assert!(!format!("{same:?}").contains("hush"));
    }

    #[test]
    fn options_without_a_url_belong_to_any() {
        let text = "[restore]\nfrom = \"s3://b\"\n[tier2]\nregion = \"eu\"\n";
        assert_eq!(settings(&config(text)).unwrap().region.as_deref(), Some("eu"));
    }

    #[test]
    fn what_is_no_bucket_is_refused_by_the_name_of_the_setting() {
        let problems = settings(&config("[restore]\nfrom = \"bucket\"\n")).unwrap_err();
        assert!(problems[0].contains("--from"), "{problems:?}");
    }
}
