//! Builds of llama.cpp that have a name before they are there, so that only those that are asked for are
//! downloaded or built.

use anyhow::{Result, ensure};
use expert_trace_tests::builds::Build;

/// A build that can be made.
pub struct Planned<'a> {
    pub name: String,
    make: Box<dyn FnOnce(String) -> Result<Build> + 'a>,
}

impl<'a> Planned<'a> {
    /// `make` gets the name.
    pub fn new(
        name: impl Into<String>,
        make: impl FnOnce(String) -> Result<Build> + 'a,
    ) -> Planned<'a> {
        Planned {
            name: name.into(),
            make: Box::new(make),
        }
    }

    /// Downloads or builds what is not in the cache.
    pub fn make(self) -> Result<Build> {
        (self.make)(self.name)
    }
}

/// Those whose names contain `filter`, of which there has to be one.
pub fn named<'a>(builds: Vec<Planned<'a>>, filter: &str) -> Result<Vec<Planned<'a>>> {
    let names: Vec<String> = builds.iter().map(|build| build.name.clone()).collect();
    let mut builds = builds;
    builds.retain(|build| build.name.contains(filter));
    ensure!(
        !builds.is_empty(),
        "no build has {filter:?} in its name; there are:\n{}",
        names.join("\n")
    );
    Ok(builds)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned() -> Vec<Planned<'static>> {
        let plan = |name: &str| Planned::new(name, |name| panic!("{name} is made"));
        vec![plan("static"), plan("shared, Clang"), plan("shared, GCC")]
    }

    #[test]
    fn a_filter_makes_nothing_and_has_to_name_a_build() {
        let names = |filter| -> Vec<String> {
            let builds = named(planned(), filter).unwrap().into_iter();
            builds.map(|build| build.name).collect()
        };
        assert_eq!(names("shared"), ["shared, Clang", "shared, GCC"]);
        assert_eq!(names("").len(), 3);
        let error = named(planned(), "typo").err().unwrap().to_string();
        assert!(
            error.ends_with("static\nshared, Clang\nshared, GCC"),
            "{error}"
        );
    }
}
