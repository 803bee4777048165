//! The texts that people name on a command line: files, folders of documents, and `-` for stdin.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use crate::control::source::file::{FILE_BYTES_MAX, document_files};

/// A text, and where it stands.
#[derive(Debug)]
pub(super) struct Given {
    /// By this name people are told of it. The key files that a document names stand beside it; beside `stdin` is where the
    /// command runs.
    pub(super) path: PathBuf,
    pub(super) text: String,
}

/// What `roots` name, in their order and each folder's files by name. What cannot be read is one line that says what to do.
pub(super) fn texts(roots: &[PathBuf]) -> Vec<Result<Given, String>> {
    roots.iter().flat_map(|root| if root == Path::new("-") { vec![stdin()] } else { below(root) }).collect()
}

/// Why a file cannot be read, and what to do.
pub(super) fn cannot_read(path: &Path, error: &io::Error) -> String {
    let what = format!("cannot read {}: {error}", path.display());
    let remedy = match error.kind() {
        io::ErrorKind::NotFound => match std::env::current_dir() {
            Ok(here) if path.is_relative() => format!("check its name, which is looked for in {}", here.display()),
            _ => "check its name".to_owned(),
        },
        io::ErrorKind::PermissionDenied => "run as a user who may read it".to_owned(),
        io::ErrorKind::FileTooLarge => "split it into several files".to_owned(),
        io::ErrorKind::InvalidData => "save it as UTF-8".to_owned(),
        io::ErrorKind::InvalidInput => "name a file or a folder".to_owned(),
        _ => return what,
    };
    format!("{what}; {remedy}")
}

fn stdin() -> Result<Given, String> {
    whole(PathBuf::from("stdin"), io::stdin())
}

fn below(root: &Path) -> Vec<Result<Given, String>> {
    // A pipe is one of these too: what another command writes need not stand in a file.
    if std::fs::metadata(root).is_ok_and(|found| !found.is_dir()) {
        return vec![read(root.to_owned())];
    }
    match document_files(root) {
        Ok(files) if files.is_empty() => {
            let ending = "give its documents names that end so";
            vec![Err(format!("{} holds no .yaml, .yml or .json file; {ending}", root.display()))]
        }
        Ok(files) => files.into_iter().map(read).collect(),
        Err(error) => vec![Err(cannot_read(root, &error))],
    }
}

fn read(path: PathBuf) -> Result<Given, String> {
    match File::open(&path) {
        Ok(file) => whole(path, file),
        Err(error) => Err(cannot_read(&path, &error)),
    }
}

/// Reads up to the end, if that comes soon enough.
fn whole(path: PathBuf, from: impl io::Read) -> Result<Given, String> {
    let mut text = String::new();
    // One byte more than may be, so that a longer text is not taken for its beginning.
    let bytes = from.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(|error| cannot_read(&path, &error))?;
    if bytes as u64 > FILE_BYTES_MAX {
        let error = io::Error::new(io::ErrorKind::FileTooLarge, format!("it has more than {FILE_BYTES_MAX} bytes"));
        return Err(cannot_read(&path, &error));
    }
    Ok(Given { path, text })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_read_says_what_to_do() {
        let told = |path: &Path| texts(&[path.to_owned()]).remove(0).unwrap_err();
        assert_eq!(
            told(Path::new("/nowhere/at/all")),
            "cannot read /nowhere/at/all: No such file or directory (os error 2); check its name"
        );
        let here = std::env::current_dir().unwrap();
        assert!(told(Path::new("nowhere.yaml")).ends_with(&format!("check its name, which is looked for in {}", here.display())));
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("latin.yaml");
        std::fs::write(&file, b"caf\xe9").unwrap();
        assert!(told(&file).ends_with("; save it as UTF-8"), "{}", told(&file));
        File::create(&file).unwrap().set_len(FILE_BYTES_MAX + 1).unwrap();
        assert!(told(&file).ends_with("; split it into several files"), "{}", told(&file));
    }

    #[test]
    fn a_file_is_read_whatever_it_is_called_and_a_folder_by_its_endings() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["b.yaml", "a.YAML", "c.json", "d.txt", ".hidden.yaml"] {
            std::fs::write(folder.path().join(name), name).unwrap();
        }
        let read = |path: PathBuf| texts(&[path]).into_iter().map(|text| text.unwrap().text).collect::<Vec<_>>();
        assert_eq!(read(folder.path().to_owned()), ["a.YAML", "b.yaml", "c.json"]);
        assert_eq!(read(folder.path().join("d.txt")), ["d.txt"]);
        assert_eq!(read(PathBuf::from("/dev/null")), [""]);
    }
}
