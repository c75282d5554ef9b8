fn main() -> std::process::ExitCode {
    polytask::commands::main()
}
