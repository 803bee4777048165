//! What the watched folders tell, and what of it stays when they change.

use std::fs;

use expect_test::{Expect, expect};
use tempfile::TempDir;

use super::*;
use crate::base::drain::Drain;

const WEB: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\nspec: {ports: [{port: 80}]}\n";
const DENY: &str = "apiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: no, namespace: shop}\nspec: {action: DENY, rules: [{}]}\n";

const POD: &str = r#"{"namespace":"shop","name":"web-1","serviceAccount":"web","addresses":["10.64.0.5"],"netns":"/n","netnsCookie":1,"cgroup":"/c","meshed":true,"supervisor":1,"startedMs":1}"#;

struct Place {
    root: TempDir,
    folders: Folders,
}

impl Place {
    fn new() -> Self {
        let root = TempDir::new().unwrap();
        let at = |name: &str| root.path().join(name);
        for name in ["mesh", "resources", "pods"] {
            fs::create_dir(at(name)).unwrap();
        }
        let folders = Self::folders(&root);
        Self { root, folders }
    }

    fn folders(root: &TempDir) -> Folders {
        let at = |name: &str| root.path().join(name);
        Folders::new(Watched { folders: vec![at("mesh")], applied: at("resources"), pods: at("pods"), kept: at("kept") })
    }

    /// Another process looks at the same folders.
    fn restart(&mut self) {
        self.folders = Self::folders(&self.root);
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.root.path().join(name), text).unwrap();
    }

    /// What the next look says, with the folder's name taken out.
    fn look(&mut self, expected: Expect) {
        let mut text = String::new();
        for change in self.folders.look(Look::Everything).unwrap_or_default().changes {
            text += &match change {
                Change::Put { key, form: Form::Read(resource), .. } => format!("put {key} {}\n", resource.to_json().len()),
                Change::Put { key, form: Form::Unreadable { reason, .. }, .. } => format!("put {key} unreadable: {reason}\n"),
                Change::Remove { key, .. } => format!("remove {key}\n"),
            };
        }
        for told in self.folders.told() {
            text += &format!("{told}\n");
        }
        expected.assert_eq(&text.replace(&format!("{}/", self.root.path().display()), ""));
    }
}

#[test]
fn documents_come_and_go_with_their_files() {
    let mut place = Place::new();
    place.look(expect![[""]]);
    place.write("mesh/web.yaml", &format!("{WEB}---\n{DENY}"));
    place.write("mesh/notes.txt", "not a document");
    place.look(expect![[r#"
        put Service/shop/web 112
        put AuthorizationPolicy/shop/no 150
    "#]]);
    place.look(expect![[""]]);
    place.write("mesh/web.yaml", WEB);
    place.look(expect![[r#"
        remove AuthorizationPolicy/shop/no
    "#]]);
    fs::remove_file(place.root.path().join("mesh/web.yaml")).unwrap();
    place.look(expect![[r#"
        remove Service/shop/web
    "#]]);
}

#[test]
fn a_file_that_holds_no_document_any_more_keeps_those_that_it_held() {
    let mut place = Place::new();
    place.write("mesh/web.yaml", &format!("{WEB}---\n{DENY}"));
    place.look(expect![[r#"
        put Service/shop/web 112
        put AuthorizationPolicy/shop/no 150
    "#]]);
    for nothing in ["", "\n", "\n \n", "\u{feff}", "# nothing\n", "---\n", "---\n---\n", "---\n# nothing\n...\n"] {
        place.write("mesh/web.yaml", nothing);
        place.look(expect![[r#"
            mesh/web.yaml: the file holds no document, and held some before
        "#]]);
    }
    place.restart();
    place.look(expect![[r#"
        put Service/shop/web 112
        put AuthorizationPolicy/shop/no 150
        mesh/web.yaml: the file holds no document, and held some before
    "#]]);
    // One that names fewer is meant so.
    place.write("mesh/web.yaml", WEB);
    place.look(expect![[r#"
        remove AuthorizationPolicy/shop/no
    "#]]);
    fs::remove_file(place.root.path().join("mesh/web.yaml")).unwrap();
    place.look(expect![[r#"
        remove Service/shop/web
    "#]]);
    place.write("mesh/web.yaml", "# nothing yet\n");
    place.look(expect![[""]]);
}

#[test]
fn what_takes_the_place_of_a_file_takes_none_of_its_documents() {
    let mut place = Place::new();
    place.write("mesh/web.yaml", WEB);
    place.look(expect![[r#"
        put Service/shop/web 112
    "#]]);
    let path = place.root.path().join("mesh/web.yaml");
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("nowhere", &path).unwrap();
    place.look(expect![[r#"
        mesh/web.yaml: the file cannot be read: No such file or directory (os error 2)
    "#]]);
    place.restart();
    place.look(expect![[r#"
        put Service/shop/web 112
        mesh/web.yaml: the file cannot be read: No such file or directory (os error 2)
    "#]]);
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    place.look(expect![[r#"
        mesh/web.yaml: the file cannot be read: it is no file
    "#]]);
    place.restart();
    place.look(expect![[r#"
        put Service/shop/web 112
        mesh/web.yaml: the file cannot be read: it is no file
    "#]]);
    fs::remove_dir(&path).unwrap();
    place.look(expect![[r#"
        remove Service/shop/web
    "#]]);
}

#[test]
fn a_bad_document_keeps_its_last_good_form() {
    let mut place = Place::new();
    place.write("mesh/web.yaml", &format!("{WEB}---\n{DENY}"));
    place.look(expect![[r#"
        put Service/shop/web 112
        put AuthorizationPolicy/shop/no 150
    "#]]);
    place.write("mesh/web.yaml", &format!("{}---\n{}", WEB.replace("80", "0"), DENY.replace("rules", "rule")));
    place.look(expect![[r#"
        mesh/web.yaml:4:17: Service/shop/web: spec.ports[0].port: 0 is not a port
        mesh/web.yaml:9:22: AuthorizationPolicy/shop/no: unknown field "rule"
    "#]]);
    place.write("mesh/web.yaml", "kind: [");
    place.look(expect![[r#"
        mesh/web.yaml:1:7: a list stands where a text is expected
    "#]]);
    place.write("mesh/web.yaml", WEB);
    place.look(expect![[r#"
        remove AuthorizationPolicy/shop/no
    "#]]);
}

#[test]
fn a_bad_security_policy_without_a_good_form_is_passed_on_to_close_its_target() {
    let mut place = Place::new();
    place.write("mesh/a.yaml", &DENY.replace("rules", "rule"));
    place.write("mesh/b.yaml", &WEB.replace("80", "0"));
    place.look(expect![[r#"
        put AuthorizationPolicy/shop/no unreadable: unknown field "rule"
        mesh/a.yaml:4:22: AuthorizationPolicy/shop/no: unknown field "rule"
        mesh/b.yaml:4:17: Service/shop/web: spec.ports[0].port: 0 is not a port
    "#]]);
}

#[test]
fn of_two_files_that_write_one_document_the_earlier_one_is_told_of_first_also_after_a_restart() {
    let mut place = Place::new();
    place.write("mesh/m.yaml", DENY);
    place.look(expect![[r#"
        put AuthorizationPolicy/shop/no 150
    "#]]);
    // One that comes while nobody looks came later too.
    place.write("mesh/a.yaml", &DENY.replace("rules: [{}]", "rules: []"));
    for _ in 0..2 {
        place.restart();
        place.look(expect![[r#"
            put AuthorizationPolicy/shop/no 150
            put AuthorizationPolicy/shop/no 137
        "#]]);
    }
    // Neither does one that is bad, and closes its target, lose its place by that.
    place.write("mesh/m.yaml", &DENY.replace("rules", "rule"));
    place.restart();
    place.look(expect![[r#"
        put AuthorizationPolicy/shop/no 150
        put AuthorizationPolicy/shop/no 137
        mesh/m.yaml:4:22: AuthorizationPolicy/shop/no: unknown field "rule"
    "#]]);
    fs::remove_file(place.root.path().join("mesh/m.yaml")).unwrap();
    place.look(expect![[r#"
        remove AuthorizationPolicy/shop/no
    "#]]);
    place.write("mesh/m.yaml", DENY);
    place.restart();
    place.look(expect![[r#"
        put AuthorizationPolicy/shop/no 137
        put AuthorizationPolicy/shop/no 150
    "#]]);
}

#[test]
fn a_folder_that_disappears_keeps_its_documents() {
    let mut place = Place::new();
    place.write("mesh/web.yaml", WEB);
    place.look(expect![[r#"
        put Service/shop/web 112
    "#]]);
    let (here, away) = (place.root.path().join("mesh"), place.root.path().join("away"));
    fs::rename(&here, &away).unwrap();
    place.look(expect![[r#"
        mesh: the folder cannot be read: No such file or directory (os error 2)
    "#]]);
    fs::rename(&away, &here).unwrap();
    place.look(expect![[""]]);
}

#[test]
fn a_bad_document_keeps_its_last_good_form_across_a_restart() {
    let mut place = Place::new();
    place.write("mesh/web.yaml", &format!("{WEB}---\n{DENY}"));
    place.look(expect![[r#"
        put Service/shop/web 112
        put AuthorizationPolicy/shop/no 150
    "#]]);
    place.write("mesh/web.yaml", &format!("{}---\n{DENY}", WEB.replace("port: 80", "port: 0")));
    place.restart();
    place.look(expect![[r#"
        put Service/shop/web 112
        put AuthorizationPolicy/shop/no 150
        mesh/web.yaml:4:17: Service/shop/web: spec.ports[0].port: 0 is not a port
    "#]]);
    // The same again for who starts after that.
    place.restart();
    place.look(expect![[r#"
        put Service/shop/web 112
        put AuthorizationPolicy/shop/no 150
        mesh/web.yaml:4:17: Service/shop/web: spec.ports[0].port: 0 is not a port
    "#]]);
    // Neither a file nor a folder that cannot be read loses what was good.
    fs::remove_file(place.root.path().join("mesh/web.yaml")).unwrap();
    fs::write(place.root.path().join("mesh/web.yaml"), [0xff]).unwrap();
    place.restart();
    place.look(expect![[r#"
        put Service/shop/web 112
        put AuthorizationPolicy/shop/no 150
        mesh/web.yaml: the file cannot be read: it is no UTF-8 text: invalid utf-8 sequence of 1 bytes from index 0
    "#]]);
    fs::rename(place.root.path().join("mesh"), place.root.path().join("away")).unwrap();
    place.restart();
    place.look(expect![[r#"
        put Service/shop/web 112
        put AuthorizationPolicy/shop/no 150
        mesh: the folder cannot be read: No such file or directory (os error 2)
    "#]]);
    // What is gone from a folder that is there is gone.
    fs::create_dir(place.root.path().join("mesh")).unwrap();
    place.look(expect![[r#"
        remove Service/shop/web
        remove AuthorizationPolicy/shop/no
    "#]]);
    place.restart();
    place.look(expect![[""]]);
    place.write("mesh/web.yaml", &WEB.replace("port: 80", "port: 0"));
    place.restart();
    place.look(expect![[r#"
        mesh/web.yaml:4:17: Service/shop/web: spec.ports[0].port: 0 is not a port
    "#]]);
}

#[test]
fn key_files_are_taken_in_and_followed() {
    let mut place = Place::new();
    let policy = "apiVersion: outrigger.dev/v1alpha1\nkind: RequestAuthentication\nmetadata: {name: t, namespace: shop}\nspec:\n  providers:\n  - {issuer: i, audiences: [a], jwksFile: keys.json}\n";
    place.write("mesh/t.yaml", policy);
    place.look(expect![[r#"
        put RequestAuthentication/shop/t 169
        mesh/t.yaml:6:33: RequestAuthentication/shop/t: spec.providers[0].jwksFile: the keys in "keys.json" cannot be read: No such file or directory (os error 2)
    "#]]);
    place.write("mesh/keys.json", r#"{"keys":[]}"#);
    place.look(expect![[r#"
        put RequestAuthentication/shop/t 188
        mesh/t.yaml:6:5: RequestAuthentication/shop/t: spec.providers[0].jwks.keys: no key is left to verify with
    "#]]);
    place.write("resources/t.yaml", &policy.replace("name: t", "name: u"));
    place.look(expect![[r#"
        put RequestAuthentication/shop/u 169
        resources/t.yaml:6:33: RequestAuthentication/shop/u: spec.providers[0].jwksFile: the keys in "keys.json" cannot be read: a stored document has no files beside it; write jwks
        mesh/t.yaml:6:5: RequestAuthentication/shop/t: spec.providers[0].jwks.keys: no key is left to verify with
    "#]]);
}

#[test]
fn a_pods_record_is_a_workload() {
    let mut place = Place::new();
    place.write("pods/shop.web-1.json", POD);
    place.look(expect![[r#"
        put Workload/shop/web-1 162
    "#]]);
    place.write("pods/shop.web-1.json", "{");
    place.look(expect![[r#"
        pods/shop.web-1.json: not a pod's record: EOF while parsing an object at line 1 column 1
    "#]]);
    fs::remove_file(place.root.path().join("pods/shop.web-1.json")).unwrap();
    place.look(expect![[r#"
        remove Workload/shop/web-1
    "#]]);
}

#[test]
fn a_record_is_looked_at_by_itself_and_not_before_it_is_whole() {
    use notify::event::{AccessKind, CreateKind, Flag, ModifyKind, RemoveKind, RenameMode};
    use notify::{Event, EventKind};
    let heard = |kind, path: &str| news(&Event::new(kind).add_path(path.into()), Path::new("/state/pods"));
    let moved = EventKind::Modify(ModifyKind::Name(RenameMode::To));
    assert_eq!(heard(moved, "/state/pods/shop.web-1.json"), Some(Look::Records));
    assert_eq!(heard(EventKind::Create(CreateKind::File), "/state/pods/.shop.web-1.json.tmp7"), None);
    assert_eq!(heard(EventKind::Access(AccessKind::Any), "/state/pods/shop.web-1.json"), None);
    assert_eq!(heard(moved, "/mesh/web.yaml"), Some(Look::Everything));
    assert_eq!(heard(EventKind::Remove(RemoveKind::Folder), "/state/pods"), Some(Look::Everything));
    let lost = Event::new(EventKind::Other).set_flag(Flag::Rescan);
    assert_eq!(news(&lost, Path::new("/state/pods")), Some(Look::Everything));
}

#[test]
fn a_look_at_records_leaves_documents_alone() {
    let mut place = Place::new();
    place.write("mesh/web.yaml", WEB);
    place.write("pods/shop.web-1.json", POD);
    let changes = place.folders.look(Look::Records).unwrap().changes;
    assert_eq!(changes.len(), 1, "{changes:?}");
    assert!(place.folders.look(Look::Records).is_none());
    place.look(expect![[r#"
        put Service/shop/web 112
    "#]]);
}

#[tokio::test]
async fn an_edit_is_noticed() {
    let Place { root, .. } = Place::new();
    let at = |name: &str| root.path().join(name);
    let watched = Watched { folders: vec![at("mesh")], applied: at("resources"), pods: at("pods"), kept: at("kept") };
    let (sender, mut batches) = mpsc::channel(4);
    let (_drain, guard) = Drain::new();
    let watching = tokio::spawn(watch(watched, sender, guard));
    let mut next = async || tokio::time::timeout(RESCAN * 2, batches.recv()).await.unwrap().unwrap();
    assert!(next().await.changes.is_empty(), "the first batch comes even if there is nothing");
    fs::write(at("mesh/web.yaml"), WEB).unwrap();
    assert_eq!(next().await.changes.len(), 1);
    drop(batches);
    watching.abort();
}
