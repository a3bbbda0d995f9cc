//! The mobula command.
fn main() {}
