//! What the cluster's own certificate may try while life goes on (P13): every piece of it is refused, and the oracle knows nothing
//! of it, because no backup of before or after may be harmed. `tests/tests/klio/backup/hostile.rs` has more of the kind against a quiet server.

use crate::{base_client::Base, client, site::Site};
use klio_proto::{Code, v1::FileKind};
use klio_storage::{
    layout::{BaseFile, BaseKind},
    repository::{Forge, ForgedPiece},
    tier2::Sha256Sum,
};
use rand::{Rng, RngCore, rngs::StdRng, seq::IndexedRandom};
use serde_json::{Value, json};
use tonic::Status;

struct Attacker {
    base: Base,
    forge: Forge,
}

impl Attacker {
    /// `None` before the first backup: there is nothing to spoil.
    async fn new(site: &Site) -> Option<Self> {
        let channel = client::connect(site, &site.bundle()).await.expect("connect");
        let base = Base::new(&channel, "main");
        let secret = match base.open_as(0).await {
            Err(status) if Code::of(&status) == Code::NotFound => return None,
            opened => opened.expect("a repository"),
        };
        Some(Self { base, forge: Forge::new(&secret).expect("a secret") })
    }

    /// What the indexes say.
    async fn packs(&self) -> Vec<Value> {
        let mut packs = Vec::new();
        for (id, _) in self.base.list(FileKind::Index).await.expect("a list") {
            let file = BaseFile { kind: BaseKind::Index, id: id.parse().expect("an id") };
            // Maintenance may have replaced it meanwhile.
            let Ok(sealed) = self.base.get(file, 0, 0).await else { continue };
            let index = self.forge.open(&sealed).expect("an index");
            packs.extend(index["packs"].as_array().expect("packs").clone());
        }
        packs
    }

    async fn put(&self, kind: BaseKind, bytes: &[u8]) -> Result<bool, Status> {
        self.base.put(BaseFile { kind, id: Sha256Sum::of(bytes) }, bytes).await
    }

    async fn put_index(&self, index: &Value) -> Result<bool, Status> {
        let sealed = self.forge.seal(index.to_string().as_bytes()).expect("sealed");
        self.put(BaseKind::Index, &sealed).await
    }
}

fn require_refused(what: &str, result: &Result<bool, Status>) {
    let refused = result
        .as_ref()
        .is_err_and(|status| matches!(Code::of(status), Code::Invalid | Code::Forbidden));
    assert!(refused, "a hostile client's {what} was not refused: {result:?}");
}

/// Several lies within one reservation, as a backup that breaks off.
pub(super) async fn attack(site: &Site, rng: &mut StdRng) {
    let Some(attacker) = Attacker::new(site).await else { return };
    let lease = attacker.base.reserve_backup(&format!("x{}", rng.random::<u32>())).await;
    let packs = attacker.packs().await;
    let mut garbage = vec![0; rng.random_range(1..60_000)];
    rng.fill_bytes(&mut garbage);
    require_refused("garbage pack", &attacker.put(BaseKind::Data, &garbage).await);
    let marks = json!({"packs": [], "packs_to_delete": packs});
    if let Some(victim) = packs.choose(rng) {
        let claim = json!({"id": Sha256Sum::of(&garbage), "blobs": victim["blobs"]});
        let result = attacker.put_index(&json!({"packs": [claim]})).await;
        require_refused("index that names existing chunks in garbage", &result);
        let (pack, mut entry) =
            attacker.forge.pack(&[ForgedPiece::good(&garbage)]).expect("a pack");
        attacker.put(BaseKind::Data, &pack).await.expect("a good pack is taken");
        entry["blobs"][0]["id"] = victim["blobs"][0]["id"].clone();
        let result = attacker.put_index(&json!({"packs": [entry]})).await;
        require_refused("index that names existing chunks in another pack", &result);
        require_refused("index that marks packs", &attacker.put_index(&marks).await);
    }
    drop(lease);
}
