//! The user that a pod's program runs as: a name or a number, with a group or without, read from `/etc/passwd` and
//! `/etc/group` (passwd(5), group(5)). Other directories of users are not asked; their users have numbers.

use std::process::Command;

use super::super::Failure;
use super::places::SIDECAR_IDS;

/// Whom a program becomes, for good and without any privilege.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct User {
    pub(crate) id: u32,
    pub(crate) group: u32,
    name: Option<String>,
    home: Option<String>,
}

impl User {
    /// From `USER[:GROUP]`.
    ///
    /// # Errors
    /// There is no such user or group, or it is one that a program without privileges may not be.
    pub(crate) fn find(text: &str) -> Result<Self, Failure> {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        Self::read(text, &read("/etc/passwd"), &read("/etc/group"))
            .map_err(|(what, remedy)| Failure::invalid([format!("--user {text:?}: {what}"), format!("remedy: {remedy}")]))
    }

    fn read(text: &str, users: &str, groups: &str) -> Result<Self, (String, &'static str)> {
        let (user, group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (text, None),
        };
        let known = Entry::find(users, user);
        let id = known.as_ref().map(|entry| entry.id).or_else(|| user.parse().ok());
        let id =
            id.ok_or_else(|| (format!("no user {user:?} stands in /etc/passwd"), "name one that does, or write its number"))?;
        let primary = known.as_ref().and_then(|entry| entry.rest.first()?.parse().ok());
        let group = match group {
            Some(name) => Entry::find(groups, name)
                .map(|entry| entry.id)
                .or_else(|| name.parse().ok())
                .ok_or_else(|| (format!("no group {name:?} stands in /etc/group"), "name one that does, or write its number"))?,
            None => primary.unwrap_or(id),
        };
        if id == 0 || group == 0 {
            return Err((
                "root's files are the mesh's token and keys".to_owned(),
                "name another user and group, or leave --user out to run the program as root",
            ));
        }
        if SIDECAR_IDS.contains(&id) || SIDECAR_IDS.contains(&group) || id == u32::MAX || group == u32::MAX {
            return Err(("the number belongs to a sidecar, or to nobody at all".to_owned(), "choose another user"));
        }
        let home = known.as_ref().and_then(|entry| entry.rest.get(2).map(|home| (*home).to_owned()));
        Ok(Self { id, group, name: known.map(|entry| entry.name.to_owned()), home })
    }

    /// What a program is told of its user: the caller's home is closed to it.
    pub(crate) fn tell(&self, command: &mut Command) {
        command.env("HOME", self.home.as_deref().filter(|home| !home.is_empty()).unwrap_or("/"));
        let number = self.id.to_string();
        let name = self.name.as_deref().unwrap_or(&number);
        command.env("USER", name).env("LOGNAME", name);
    }
}

/// A line of either file: a name, a password's place, a number, the rest.
struct Entry<'a> {
    name: &'a str,
    id: u32,
    rest: Vec<&'a str>,
}

impl<'a> Entry<'a> {
    /// The one of that name; else the first one of that number.
    fn find(file: &'a str, wanted: &str) -> Option<Self> {
        let entries = || {
            file.lines().filter_map(|line| {
                let mut fields = line.split(':');
                let (name, _password, id) = (fields.next()?, fields.next()?, fields.next()?.parse().ok()?);
                Some(Self { name, id, rest: fields.collect() })
            })
        };
        let by_number = || wanted.parse().ok().and_then(|id: u32| entries().find(|entry| entry.id == id));
        entries().find(|entry| entry.name == wanted).or_else(by_number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const USERS: &str = "root:x:0:0:root:/root:/bin/sh\nweb:x:1001:1002:Web,,,:/srv/web:/bin/false\nbroken\n";
    const GROUPS: &str = "root:x:0:\nmedia:x:44:web\n";

    fn ids(text: &str) -> Result<(u32, u32), String> {
        User::read(text, USERS, GROUPS).map(|user| (user.id, user.group)).map_err(|(what, _remedy)| what)
    }

    #[test]
    fn a_user_is_a_name_or_a_number_with_its_own_group_or_another() {
        assert_eq!(ids("web"), Ok((1001, 1002)));
        assert_eq!(ids("1001"), Ok((1001, 1002)));
        assert_eq!(ids("web:media"), Ok((1001, 44)));
        assert_eq!(ids("web:7"), Ok((1001, 7)));
        assert_eq!(ids("5000"), Ok((5000, 5000)));
        assert!(ids("nobody-here").unwrap_err().contains("/etc/passwd"));
        assert!(ids("web:nothing").unwrap_err().contains("/etc/group"));
        assert!(ids("").is_err() && ids("web:").is_err());
    }

    #[test]
    fn neither_root_nor_a_sidecar_is_a_user_without_privileges() {
        for text in ["root", "0", "web:root", "web:0", "1900000002", "web:1900000002", "4294967295"] {
            assert!(ids(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_program_is_told_its_users_home() {
        let told = |text: &str| {
            let mut command = Command::new("true");
            User::read(text, USERS, GROUPS).unwrap().tell(&mut command);
            let value = |name: &str| {
                command.get_envs().find(|(key, _)| *key == name).and_then(|(_, value)| value?.to_str().map(str::to_owned))
            };
            (value("HOME"), value("USER"))
        };
        assert_eq!(told("web"), (Some("/srv/web".into()), Some("web".into())));
        assert_eq!(told("5000"), (Some("/".into()), Some("5000".into())));
    }
}
