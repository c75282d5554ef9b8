//! The sources of the custom kernels.

pub const BYTE_CONVOLUTION: &str = include_str!("byte_convolution.cu");
pub const CLIP: &str = include_str!("clip.cu");
pub const CRF: &str = include_str!("crf.cu");
pub const CROSS_ENTROPY: &str = include_str!("cross_entropy.cu");
pub const GATHER: &str = include_str!("gather.cu");
pub const LINEAR: &str = include_str!("linear.cu");
pub const MAX_POOL: &str = include_str!("max_pool.cu");
pub const OPTIMIZER: &str = include_str!("optimizer.cu");
pub const PUT: &str = include_str!("put.cu");
pub const RANDOM: &str = include_str!("random.cu");
pub const WEIGHTING: &str = include_str!("weighting.cu");

/// All of them, those first that take longest to compile.
pub(super) const ALL: [&str; 11] =
    [OPTIMIZER, CRF, WEIGHTING, LINEAR, BYTE_CONVOLUTION, CROSS_ENTROPY, RANDOM, MAX_POOL, CLIP, GATHER, PUT];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_sources_are_listed() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/libtorch");
        let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let mut sources: Vec<String> = files
            .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
            .map(|path| std::fs::read_to_string(path).unwrap())
            .collect();
        let mut known = ALL;
        sources.sort();
        known.sort();
        assert!(sources == known, "ALL does not list every .cu file");
    }
}
