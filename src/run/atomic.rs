//! Files that are written completely or not at all.

use std::fs::{File, Metadata, OpenOptions, Permissions};
use std::io::{BufRead, BufReader, Error as IoError, ErrorKind, Result as IoResult, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, Result};
use tempfile::NamedTempFile;

/// Unfinished files and folders, which [`clear`] removes if a signal ends the process.
static UNFINISHED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Attempts to remove a folder that other threads are writing to.
const TRIES: usize = 100;

fn with_unfinished(change: impl FnOnce(&mut Vec<PathBuf>)) {
    change(&mut UNFINISHED.lock().unwrap_or_else(|poisoned| poisoned.into_inner()));
}

/// Registers a file or folder as unfinished until dropped.
pub struct Unfinished(PathBuf);

impl Unfinished {
    pub fn new(path: &Path) -> Self {
        with_unfinished(|paths| paths.push(path.to_owned()));
        Unfinished(path.to_owned())
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        with_unfinished(|paths| paths.retain(|path| *path != self.0));
    }
}

/// Removes all unfinished files and folders before the process ends.
pub fn clear() {
    with_unfinished(|paths| {
        for path in paths.drain(..) {
            // Other threads may still be writing to the folder.
            let gone =
                || std::fs::remove_file(&path).or_else(|_| std::fs::remove_dir_all(&path)).is_ok() || !path.exists();
            (0..TRIES).find(|_| gone());
        }
    });
}

const PREFIX: &str = ".partial-";

/// Removes unfinished files that a killed process left in a folder; no other process may be writing to it.
pub fn sweep(folder: &Path) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(PREFIX) {
            std::fs::remove_file(entry.path()).ok();
        }
    }
}

/// A file being written. It is removed on drop unless [`Partial::keep`] is called.
pub struct Partial {
    path: PathBuf,
    way: Way,
}

enum Way {
    /// A temporary file next to its destination.
    Beside(NamedTempFile, Unfinished),
    /// The destination itself, if it exists and is not a regular file, such as a pipe.
    Itself(File),
}

impl Partial {
    pub fn new(path: &Path) -> IoResult<Self> {
        // A symbolic link is kept, and its target replaced.
        let path = path.canonicalize().unwrap_or(path.to_owned());
        if path.exists() && !path.is_file() {
            let file = OpenOptions::new().write(true).open(&path)?;
            return Ok(Partial { path, way: Way::Itself(file) });
        }
        let folder = folder_of(&path);
        if !folder.is_dir() {
            return Err(IoError::new(ErrorKind::NotFound, format!("there is no folder {}", folder.display())));
        }
        let mut options = tempfile::Builder::new();
        // The process's umask is applied to these.
        options.prefix(PREFIX).permissions(Permissions::from_mode(0o666));
        // Without the name of the temporary file.
        let file = options.tempfile_in(folder).map_err(|error| IoError::from(error.kind()))?;
        if let Ok(old) = path.metadata() {
            file.as_file().set_permissions(old.permissions())?;
        }
        let unfinished = Unfinished::new(file.path());
        Ok(Partial { path, way: Way::Beside(file, unfinished) })
    }

    /// Flushes it to disk and renames it into place.
    pub fn keep(self) -> Result<()> {
        let Partial { path, way } = self;
        let attempt = || -> IoResult<()> {
            let Way::Beside(file, _unfinished) = way else { return Ok(()) };
            file.as_file().sync_all()?;
            file.persist(&path)?;
            // The rename itself must reach the disk too.
            File::open(folder_of(&path))?.sync_all()
        };
        attempt().with_context(|| format!("{} could not be written", path.display()))
    }

    fn file(&mut self) -> &mut File {
        match &mut self.way {
            Way::Beside(file, _) => file.as_file_mut(),
            Way::Itself(file) => file,
        }
    }
}

impl Write for Partial {
    fn write(&mut self, bytes: &[u8]) -> IoResult<usize> {
        self.file().write(bytes)
    }

    fn flush(&mut self) -> IoResult<()> {
        self.file().flush()
    }
}

pub fn write(path: &Path, content: &[u8]) -> Result<()> {
    let filled = || -> IoResult<Partial> {
        let mut file = Partial::new(path)?;
        file.write_all(content)?;
        Ok(file)
    };
    filled().with_context(|| format!("{} could not be written", path.display()))?.keep()
}

/// Replaces the file by a hard link to the first of `others` that has the same content, so that it needs no space of its own.
pub fn link_to_same(path: &Path, mut others: impl Iterator<Item = PathBuf>) -> IoResult<()> {
    let own = path.metadata()?;
    let may_be_same =
        |about: &Metadata| about.len() == own.len() && (about.dev(), about.ino()) != (own.dev(), own.ino());
    let is_same = |other: &PathBuf| other.metadata().is_ok_and(|about| may_be_same(&about)) && same_bytes(path, other);
    let Some(same) = others.find(is_same) else { return Ok(()) };
    let link = tempfile::Builder::new().prefix(PREFIX).make_in(folder_of(path), |at| std::fs::hard_link(&same, at))?;
    link.persist(path)?;
    Ok(())
}

/// Whether two readable files of the same length have the same content.
fn same_bytes(one: &Path, other: &Path) -> bool {
    let chunks = |path: &Path| Ok::<_, IoError>(BufReader::with_capacity(1 << 20, File::open(path)?));
    let (Ok(mut one), Ok(mut other)) = (chunks(one), chunks(other)) else { return false };
    loop {
        let (Ok(a), Ok(b)) = (one.fill_buf(), other.fill_buf()) else { return false };
        let n = a.len().min(b.len());
        if n == 0 || a[..n] != b[..n] {
            return a.is_empty() && b.is_empty();
        }
        one.consume(n);
        other.consume(n);
    }
}

/// Renames a file or folder so that after a power failure it is at `to` completely or not at all.
pub fn rename(from: &Path, to: &Path) -> IoResult<()> {
    sync(from)?;
    std::fs::rename(from, to)?;
    File::open(folder_of(to))?.sync_all()
}

fn sync(path: &Path) -> IoResult<()> {
    if path.is_dir() {
        for entry in std::fs::read_dir(path)? {
            sync(&entry?.path())?;
        }
    }
    File::open(path)?.sync_all()
}

/// The folder that contains `path`.
pub fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_stay_modes_stay_and_what_is_not_kept_vanishes() {
        let folder = tempfile::tempdir().unwrap();
        let (target, link) = (folder.path().join("target"), folder.path().join("link"));
        std::fs::write(&target, "old").unwrap();
        std::fs::set_permissions(&target, Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        Partial::new(&link).unwrap().write_all(b"lost").unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), b"old");
        write(&link, b"new").unwrap();
        assert_eq!((std::fs::read(&target).unwrap(), link.is_symlink()), (b"new".to_vec(), true));
        assert_eq!(target.metadata().unwrap().permissions().mode() & 0o777, 0o640);
        write(Path::new("/dev/null"), b"away").unwrap();
        assert!(!Path::new("/dev/null").is_file());
        assert!(write(folder.path(), b"a folder").is_err());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn files_of_the_same_content_are_stored_once_and_replaced_apart() {
        let folder = tempfile::tempdir().unwrap();
        let [first, other, again, also] = ["first", "other", "again", "also"].map(|name| folder.path().join(name));
        std::fs::write(&first, "same").unwrap();
        std::fs::write(&other, "else").unwrap();
        std::fs::write(&again, "same").unwrap();
        let all = || [&again, &other, &first].map(PathBuf::clone).into_iter();
        link_to_same(&again, all()).unwrap();
        link_to_same(&other, all()).unwrap();
        // The same file by another name.
        std::os::unix::fs::symlink(&again, &also).unwrap();
        link_to_same(&again, std::iter::once(also)).unwrap();
        let file = |path: &Path| path.metadata().unwrap().ino();
        assert!(file(&again) == file(&first) && file(&other) != file(&first));
        write(&again, b"new").unwrap();
        assert_eq!(std::fs::read(&first).unwrap(), b"same");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 4);
    }
}
