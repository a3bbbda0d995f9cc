//! The server as its clients see it: real HTTP on free ports, models behind gates, no sleeps.

mod faults;
mod protocol;
mod repository;
mod support;
