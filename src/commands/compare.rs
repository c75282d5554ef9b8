pub fn show(_: &[std::path::PathBuf], _: Option<()>) -> anyhow::Result<()> { Ok(()) }
