//! Which model a context runs of which nothing was seen. Pure.

/// What is known of a process.
#[derive(Debug)]
pub struct Known<'a> {
    /// Its models.
    pub models: &'a [usize],
    /// Those of them with NextN blocks, which run in contexts of their own.
    pub nextn: &'a [usize],
    /// Of each context of which routing was seen, the models that it can run.
    pub seen: &'a [Vec<usize>],
    /// How many contexts there are of which none was.
    pub unseen: usize,
}

/// The model of a context of which nothing was seen, by elimination; `computed` tells that it is known to
/// have computed tokens.
///
/// All contexts of a model find its tensors where they are. So beside one that was seen, one that was not
/// runs another model, or blocks of it that others do not run.
pub fn model(known: &Known<'_>, computed: bool) -> Option<usize> {
    let Known {
        models,
        nextn,
        seen,
        unseen,
    } = *known;
    match (models, nextn, seen) {
        // Its NextN blocks do not run without the others.
        ([only], _, []) if nextn.is_empty() || unseen == 1 => Some(*only),
        (_, [], [_, ..]) if computed => {
            let is_sure = seen.iter().all(|fitting| fitting.len() == 1);
            let is_left = |model: &&usize| !seen.iter().any(|fitting| fitting.contains(model));
            let mut left = models.iter().filter(is_left);
            match (left.next(), left.next()) {
                (Some(model), None) if is_sure => Some(*model),
                _ => None,
            }
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAIN: usize = 0;
    const DRAFT: usize = 1;

    fn known<'a>(models: &'a [usize], seen: &'a [Vec<usize>]) -> Known<'a> {
        Known {
            models,
            nextn: &[],
            seen,
            unseen: 1,
        }
    }

    #[test]
    fn the_only_model_is_the_one() {
        let two = Known {
            unseen: 2,
            ..known(&[MAIN], &[])
        };
        assert_eq!(model(&two, false), Some(MAIN));
        assert_eq!(model(&known(&[MAIN, DRAFT], &[]), true), None);
        // It is that of the context that was seen.
        assert_eq!(model(&known(&[MAIN], &[vec![MAIN]]), true), None);
        assert_eq!(model(&known(&[], &[]), true), None);
    }

    #[test]
    fn the_one_that_no_other_context_runs_is_left() {
        let models = [MAIN, DRAFT];
        let main = [vec![MAIN], vec![MAIN]];
        assert_eq!(model(&known(&models, &main), true), Some(DRAFT));
        // Whether it computed anything for a model is not known.
        assert_eq!(model(&known(&models, &main), false), None);
        assert_eq!(model(&known(&models, &[vec![MAIN, DRAFT]]), true), None);
        assert_eq!(model(&known(&models, &[vec![MAIN], vec![]]), true), None);
        assert_eq!(model(&known(&[MAIN, DRAFT, 2], &main), true), None);
    }

    #[test]
    fn blocks_that_predict_further_tokens_run_in_contexts_of_their_own() {
        let of = |models, seen, unseen| {
            let known = Known {
                nextn: &[MAIN],
                unseen,
                ..known(models, seen)
            };
            model(&known, true)
        };
        assert_eq!(of(&[MAIN], &[], 1), Some(MAIN));
        assert_eq!(of(&[MAIN], &[], 2), None);
        assert_eq!(of(&[MAIN, DRAFT], &[vec![MAIN]], 1), None);
    }
}
