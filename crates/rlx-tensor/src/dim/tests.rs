use super::*;

fn batch() -> Dim {
    Dim::symbol("batch")
}

fn seq() -> Dim {
    Dim::symbol("seq")
}

#[test]
fn normal_form_decides_polynomial_equality() {
    assert_eq!(batch() * seq() + batch(), batch() * (seq() + 1));
    assert_eq!((batch() + 1) * (batch() - 1), batch() * batch() - 1);
    assert_eq!(batch() - batch(), Dim::Known(0));
    assert_eq!((batch() * 4).floor_div(4), batch());
    assert_eq!((batch() * seq() * 6).ceil_div(seq() * 2), batch() * 3);
}

#[test]
fn comparison_is_honest() {
    assert_eq!(batch().compare(&batch()), DimOrder::Equal);
    assert_eq!((batch() + 1).compare(&batch()), DimOrder::Different);
    assert_eq!(batch().compare(&seq()), DimOrder::Unknown);
    assert_eq!(Dim::Known(3).compare(&Dim::Known(4)), DimOrder::Different);
}

#[test]
fn evaluates_with_checks() {
    let binding = DimBinding::new().with("batch", 3).with("seq", 10);
    assert_eq!((batch() * seq() + 2).eval(&binding), Ok(32));
    assert_eq!(seq().ceil_div(4).eval(&binding), Ok(3));
    assert_eq!(seq().floor_div(4).eval(&binding), Ok(2));
    assert_eq!(seq().minimum(batch()).eval(&binding), Ok(3));
    assert_eq!(seq().maximum(batch()).eval(&binding), Ok(10));
    assert!(matches!((batch() - seq()).eval(&binding), Err(DimError::OutOfRange { value: -7, .. })));
    assert!(matches!(Dim::symbol("past").eval(&binding), Err(DimError::Unbound { .. })));
    let zero = DimBinding::new().with("batch", 0).with("seq", 1);
    assert!(matches!(seq().ceil_div(batch()).eval(&zero), Err(DimError::DivideByZero { .. })));
    let huge = DimBinding::new().with("batch", usize::MAX);
    assert!((batch() * batch() * batch() * batch()).eval(&huge).is_err());
}

#[test]
fn text_parses_back() {
    for dim in [
        Dim::Known(7),
        batch() * seq() * 3 - 2,
        (seq() + 1).ceil_div(64) * batch(),
        Dim::symbol("past") + seq().minimum(batch()).maximum(3),
        Dim::Known(0) - batch(),
    ] {
        let text = dim.to_string();
        assert_eq!(text.parse::<Dim>().unwrap(), dim, "{text}");
    }
    for bad in ["", "3 +", "f(a, b)", "min(a", "3 4", "a*", "99999999999999999999999"] {
        assert!(bad.parse::<Dim>().is_err(), "{bad}");
    }
    assert!("min(a,".repeat(200).parse::<Dim>().is_err());
}

#[test]
fn substitution_renormalises() {
    let dim = batch() * seq() + 1;
    let replaced = dim.substitute(&|s| (s.name() == "seq").then_some(Dim::Known(4)));
    assert_eq!(replaced, batch() * 4 + 1);
}

#[test]
fn binding_conflicts_are_errors() {
    let mut binding = DimBinding::new();
    let symbol = Symbol::new("batch");
    binding.bind(&symbol, 2).unwrap();
    binding.bind(&symbol, 2).unwrap();
    assert!(matches!(binding.bind(&symbol, 3), Err(DimError::Conflict { first: 2, second: 3, .. })));
}

#[test]
fn a_symbol_plus_a_number_is_recognised() {
    let shifted = batch() + 3;
    assert_eq!(shifted.as_symbol_plus().map(|(s, n)| (s.name(), n)), Some(("batch", 3)));
    assert_eq!(batch().as_symbol_plus().map(|(s, n)| (s.name(), n)), Some(("batch", 0)));
    for other in [batch() * 2 + 1, batch() - 1, batch() + seq(), batch() * seq(), Dim::Known(3)] {
        assert_eq!(other.as_symbol_plus(), None, "{other}");
    }
}
