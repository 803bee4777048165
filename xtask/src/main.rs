//! The project's automation.

mod generate;

fn main() -> anyhow::Result<()> {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask stands in the workspace");
    match std::env::args().nth(1).as_deref() {
        Some("gen") => generate::run(root),
        _ => anyhow::bail!("usage: cargo xtask gen"),
    }
}
