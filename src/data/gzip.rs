//! Reads plain and gzip-compressed files, which are recognised by their first two bytes.

use std::io::{BufRead, BufReader, Read, Result};
use std::path::Path;

use flate2::bufread::MultiGzDecoder;

const MAGIC: [u8; 2] = [0x1f, 0x8b];

/// The content of a file, decompressed.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    let packed = std::fs::read(path)?;
    if !packed.starts_with(&MAGIC) {
        return Ok(packed);
    }
    let mut bytes = Vec::new();
    MultiGzDecoder::new(&packed[..]).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The same as a stream.
pub fn unpacked(source: impl Read + 'static) -> Result<Box<dyn BufRead>> {
    let mut source = BufReader::new(source);
    Ok(match source.fill_buf()?.starts_with(&MAGIC) {
        true => Box::new(BufReader::new(MultiGzDecoder::new(source))),
        false => Box::new(source),
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;

    #[test]
    fn packed_files_in_parts_are_read_whole_and_cut_ones_are_not() {
        let packed = |text: &[u8]| {
            let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
            encoder.write_all(text).unwrap();
            encoder.finish().unwrap()
        };
        let file = tempfile::NamedTempFile::new().unwrap();
        let check = |content: &[u8]| {
            std::fs::write(file.path(), content).unwrap();
            let streamed = unpacked(std::fs::File::open(file.path()).unwrap()).and_then(|mut source| {
                let mut bytes = Vec::new();
                source.read_to_end(&mut bytes).map(|_| bytes)
            });
            (read(file.path()).ok(), streamed.ok())
        };
        let twice = [packed(b"a\nb\n"), packed(b"c\n")].concat();
        for (content, text) in [(&twice[..], &b"a\nb\nc\n"[..]), (b"a\n", b"a\n"), (b"", b"")] {
            assert_eq!(check(content), (Some(text.to_vec()), Some(text.to_vec())));
        }
        assert_eq!(check(&twice[..twice.len() - 9]), (None, None));
    }
}
