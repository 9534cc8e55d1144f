//! One directory of a snapshot, parsed from restic's JSON into a small form, because a directory may have
//! a million files.
//!
//! Names that would leave the directory, and kinds that klio never stores, count as damage.

use super::{
    StoredKind,
    reader::{ChunkId, sum},
};
use crate::sum::Sha256Sum;
use rustic_core::repofile::{Node, NodeType};
use serde::{Deserialize, Deserializer, de::Error as _};
use std::{
    ffi::OsString,
    time::{SystemTime, UNIX_EPOCH},
};

/// An entry without its path.
#[derive(Debug)]
pub(super) struct TreeNode {
    pub(super) name: OsString,
    pub(super) kind: StoredKind,
    /// The tree with its contents, for a directory.
    pub(super) tree: Option<Sha256Sum>,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: SystemTime,
}

#[derive(Deserialize)]
struct TreeJson {
    /// restic writes null if there are none.
    nodes: Option<Vec<TreeNode>>,
}

/// Parses a tree; the error says what is wrong with it.
pub(super) fn parse(json: &[u8]) -> Result<Vec<TreeNode>, String> {
    let tree: TreeJson =
        serde_json::from_slice(json).map_err(|e| format!("expected restic's tree JSON: {e}"))?;
    Ok(tree.nodes.unwrap_or_default())
}

impl<'de> Deserialize<'de> for TreeNode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // rustic's node is four times as large; converting here means that only one exists at a time.
        Self::try_from(Node::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

impl TryFrom<Node> for TreeNode {
    type Error = String;

    fn try_from(node: Node) -> Result<Self, String> {
        let name = node.name().into_owned();
        let bytes = name.as_encoded_bytes();
        if bytes.is_empty() || bytes == b"." || bytes == b".." || bytes.contains(&b'/') {
            return Err(format!("{name:?} is not a file name"));
        }
        let (kind, tree) = kind(&node)?;
        let (mode, uid, gid) = (node.meta.mode, node.meta.uid, node.meta.gid);
        let mode = mode.unwrap_or(0o700) & 0o7777;
        let mtime = node.meta.mtime.map_or(UNIX_EPOCH, SystemTime::from);
        let (uid, gid) = (uid.unwrap_or(0), gid.unwrap_or(0));
        Ok(Self { name, kind, tree, mode, uid, gid, mtime })
    }
}

fn kind(node: &Node) -> Result<(StoredKind, Option<Sha256Sum>), String> {
    let read = |hex: &str| sum(hex).map_err(|e| e.detail);
    match &node.node_type {
        NodeType::Dir => {
            let tree =
                node.subtree.ok_or_else(|| format!("directory {:?} has no tree", node.name))?;
            Ok((StoredKind::Dir, Some(read(&tree.to_hex())?)))
        }
        NodeType::Symlink { .. } => {
            Ok((StoredKind::Symlink(node.node_type.to_link().to_owned()), None))
        }
        NodeType::File => {
            let ids = node.content.iter().flatten();
            let chunks =
                ids.map(|id| Ok(ChunkId(read(&id.to_hex())?))).collect::<Result<_, String>>()?;
            Ok((StoredKind::File { size: node.meta.size, chunks }, None))
        }
        other => Err(format!("{:?} is a {other}, which klio never stores", node.name)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(node: &str) -> Result<Vec<TreeNode>, String> {
        parse(format!(r#"{{"nodes":[{node}]}}"#).as_bytes())
    }

    #[test]
    fn a_node_that_klio_never_stores_or_that_leaves_its_directory_is_damage() {
        let id = "ab".repeat(32);
        tree(&format!(r#"{{"name":"a","type":"file","size":3,"content":["{id}"]}}"#)).unwrap();
        for bad in [
            r#"{"name":"..","type":"file","content":[]}"#,
            r#"{"name":"a/b","type":"file","content":[]}"#,
            r#"{"name":"","type":"file","content":[]}"#,
            r#"{"name":"\\x2e\\x2e","type":"file","content":[]}"#,
            r#"{"name":"a","type":"fifo"}"#,
            r#"{"name":"a","type":"dir"}"#,
            r#"{"name":"a","type":"file","content":["zz"]}"#,
            r#"{"type":"file"}"#,
        ] {
            assert!(tree(bad).is_err(), "{bad}");
        }
        assert!(parse(b"{").is_err());
        assert_eq!(parse(br#"{"nodes":null}"#).unwrap().len(), 0);
    }
}
