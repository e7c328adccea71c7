//! Patterns as values. A pattern describes a value by what makes it; matching one binds names to values.

use crate::graph::Source;
use crate::ids::{NodeId, ValueId};
use crate::op::{OpAttrs, OpDef};
use crate::ops::Op;
use crate::rewrite::{Draft, DraftNode};

type OpTest = Box<dyn Fn(&Op) -> bool + Send + Sync>;
type ValueTest = Box<dyn Fn(&Draft, ValueId) -> bool + Send + Sync>;

/// A description of a value.
pub struct Pattern {
    kind: Kind,
    name: Option<&'static str>,
    single_use: bool,
    tests: Vec<ValueTest>,
}

enum Kind {
    Any,
    Const,
    Param,
    Op { name: &'static str, tests: Vec<OpTest>, inputs: Option<Vec<Pattern>> },
    OneOf(Vec<Pattern>),
}

/// Any value.
pub fn any() -> Pattern {
    Pattern::of(Kind::Any)
}

/// Any value, bound to a name.
pub fn bind(name: &'static str) -> Pattern {
    any().named(name)
}

/// A constant.
pub fn constant() -> Pattern {
    Pattern::of(Kind::Const)
}

/// A param.
pub fn param() -> Pattern {
    Pattern::of(Kind::Param)
}

/// A constant of one element that holds this number, up to the rounding of its dtype.
pub fn scalar(number: f64) -> Pattern {
    constant().such_that(move |draft, value| {
        let close = |found: f64| (found - number).abs() <= 1e-6 * number.abs();
        let exact = |found: f64| found == number;
        draft.as_scalar(value).is_some_and(|v| if number == number.trunc() { exact(v) } else { close(v) })
    })
}

/// The first result of an op of this type, whatever its operands.
pub fn op<T: OpDef + OpAttrs>() -> Pattern {
    Pattern::of(Kind::Op { name: T::NAME, tests: Vec::new(), inputs: None })
}

/// A value that one of these describes; the first that fits binds its names.
pub fn one_of(patterns: impl IntoIterator<Item = Pattern>) -> Pattern {
    Pattern::of(Kind::OneOf(patterns.into_iter().collect()))
}

impl Pattern {
    fn of(kind: Kind) -> Self {
        Self { kind, name: None, single_use: false, tests: Vec::new() }
    }

    /// With these operands, all of them; in either order if the op is commutative.
    #[must_use]
    pub fn with<const N: usize>(mut self, operands: [Pattern; N]) -> Self {
        if let Kind::Op { inputs, .. } = &mut self.kind {
            *inputs = Some(operands.into());
        }
        self
    }

    /// Where the op's attributes satisfy a predicate.
    #[must_use]
    pub fn attr<T: OpDef>(mut self, test: impl Fn(&T) -> bool + Send + Sync + 'static) -> Self {
        if let Kind::Op { tests, .. } = &mut self.kind {
            tests.push(Box::new(move |op| op.downcast::<T>().is_some_and(&test)));
        }
        self
    }

    /// Where the value satisfies a predicate.
    #[must_use]
    pub fn such_that(mut self, test: impl Fn(&Draft, ValueId) -> bool + Send + Sync + 'static) -> Self {
        self.tests.push(Box::new(test));
        self
    }

    /// Binds the value to a name. A name that occurs twice must match one value.
    #[must_use]
    pub fn named(mut self, name: &'static str) -> Self {
        self.name = Some(name);
        self
    }

    /// Where one operand, or one named output, is all that uses the value.
    #[must_use]
    pub fn single_use(mut self) -> Self {
        self.single_use = true;
        self
    }

    /// The names of the ops that can stand at the root.
    pub(crate) fn roots(&self) -> Vec<&'static str> {
        match &self.kind {
            Kind::Op { name, .. } => vec![name],
            Kind::OneOf(patterns) => patterns.iter().flat_map(Pattern::roots).collect(),
            _ => Vec::new(),
        }
    }

    /// Matches the first result of a node.
    pub fn matches(&self, draft: &Draft, root: NodeId) -> Option<Match> {
        let value = *draft.node(root).outputs().first()?;
        let bound = solve(draft, vec![(value, self)], Vec::new())?;
        Some(Match { root, bound })
    }
}

type Bindings = Vec<(&'static str, ValueId)>;

/// Works off goals one by one; where an op is commutative, both orders of its operands are tried.
fn solve(draft: &Draft, mut goals: Vec<(ValueId, &Pattern)>, mut bound: Bindings) -> Option<Bindings> {
    while let Some((value, pattern)) = goals.pop() {
        if pattern.single_use && draft.use_count(value) != 1 {
            return None;
        }
        if let Some(name) = pattern.name {
            match bound.iter().find(|(n, _)| *n == name) {
                Some(&(_, other)) if other != value => return None,
                Some(_) => {}
                None => bound.push((name, value)),
            }
        }
        if !pattern.tests.iter().all(|test| test(draft, value)) {
            return None;
        }
        match &pattern.kind {
            Kind::Any => {}
            Kind::Const => {
                draft.as_const(value)?;
            }
            Kind::Param => match draft.source(value) {
                Source::Param => {}
                _ => return None,
            },
            Kind::OneOf(patterns) => {
                return patterns.iter().find_map(|p| {
                    let mut goals = goals.clone();
                    goals.push((value, p));
                    solve(draft, goals, bound.clone())
                });
            }
            Kind::Op { name, tests, inputs } => {
                let Source::Node { node, index: 0 } = draft.source(value) else { return None };
                let node = draft.node(*node);
                let def = node.op().def();
                if def.name() != *name || !tests.iter().all(|test| test(node.op())) {
                    return None;
                }
                let Some(patterns) = inputs else { continue };
                if patterns.len() != node.inputs().len() {
                    return None;
                }
                if patterns.len() == 2 && def.props().commutative {
                    let [a, b] = [node.inputs()[0], node.inputs()[1]];
                    return [(a, b), (b, a)].into_iter().find_map(|(left, right)| {
                        let mut goals = goals.clone();
                        goals.push((right, &patterns[1]));
                        goals.push((left, &patterns[0]));
                        solve(draft, goals, bound.clone())
                    });
                }
                goals.extend(node.inputs().iter().copied().zip(patterns).rev());
            }
        }
    }
    Some(bound)
}

/// What a pattern matched.
#[derive(Debug, Clone, PartialEq)]
pub struct Match {
    root: NodeId,
    bound: Bindings,
}

impl Match {
    /// A match of a node as such, with no names bound.
    pub fn at(root: NodeId) -> Self {
        Self { root, bound: Vec::new() }
    }

    /// The node whose result the pattern describes.
    pub fn root(&self) -> NodeId {
        self.root
    }

    /// The root's record.
    pub fn node<'d>(&self, draft: &'d Draft) -> &'d DraftNode {
        draft.node(self.root)
    }

    /// The value bound to a name; `None` if the pattern that matched has no such name.
    pub fn value(&self, name: &str) -> Option<ValueId> {
        self.bound.iter().find(|(n, _)| *n == name).map(|&(_, v)| v)
    }

    /// The root's first result.
    pub fn result(&self, draft: &Draft) -> Option<ValueId> {
        draft.node(self.root).outputs().first().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::Graph;
    use crate::ops::binary::{Binary, BinaryOp};
    use crate::ops::unary::{Unary, UnaryOp};

    const PRODUCT: &str = r#"graph "g" {
  input @x : f32[rows]
  %1 : f32[rows] = unary(@x) {kind=exp}
  %2 : f32[rows] = binary(%1, @x) {kind=mul}
  %3 : f32[rows] = binary(%1, @x) {kind=sub}
  return "y": %2, "z": %3
}"#;

    fn matches(pattern: &Pattern) -> Vec<BinaryOp> {
        let graph: Graph = PRODUCT.parse().unwrap();
        let draft = Draft::new(&graph);
        let found = draft.nodes().filter_map(|(id, _)| pattern.matches(&draft, id));
        found.filter_map(|m| Some(m.node(&draft).op().downcast::<Binary>()?.kind)).collect()
    }

    fn exp() -> Pattern {
        op::<Unary>().attr(|u: &Unary| u.kind == UnaryOp::Exp).with([bind("x")])
    }

    #[test]
    fn commutative_operands_match_in_either_order_and_others_do_not() {
        assert_eq!(matches(&op::<Binary>().with([exp(), bind("x")])), [BinaryOp::Mul, BinaryOp::Sub]);
        assert_eq!(matches(&op::<Binary>().with([bind("x"), exp()])), [BinaryOp::Mul]);
    }

    #[test]
    fn a_name_that_occurs_twice_is_one_value() {
        assert!(matches(&op::<Binary>().with([bind("x"), bind("x")])).is_empty());
    }

    #[test]
    fn single_use_counts_named_outputs() {
        assert!(matches(&op::<Binary>().with([exp().single_use(), any()])).is_empty());
        assert_eq!(
            matches(&op::<Binary>().with([any(), any()]).single_use()),
            [BinaryOp::Mul, BinaryOp::Sub]
        );
    }
}
