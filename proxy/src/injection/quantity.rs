//! Amounts of processor and memory, as Kubernetes writes them (resource.Quantity).

/// The amount in thousandths of its unit; none if the text is no amount, or none that is more than nothing.
///
/// Finer than a thousandth is not asked of anybody, and more than the number has room for is no amount either.
pub(super) fn thousandths(text: &str) -> Option<u128> {
    read(text).filter(|amount| *amount > 0)
}

/// The `whole` with `part` in the place of a `former` part of it; none if one of them is no amount.
pub(super) fn instead(whole: &str, former: &str, part: &str) -> Option<String> {
    let amount = read(whole)?.saturating_sub(read(former)?).checked_add(read(part)?)?;
    let units = amount / 1_000;
    if amount % 1_000 != 0 {
        return Some(format!("{amount}m"));
    }
    let is_binary = [whole, part].iter().any(|text| text.ends_with('i'));
    let largest =
        [("Gi", 30), ("Mi", 20), ("Ki", 10)].into_iter().find(|(_unit, bits)| is_binary && units.trailing_zeros() >= *bits);
    Some(match largest {
        Some((unit, bits)) => format!("{}{unit}", units >> bits),
        None => units.to_string(),
    })
}

fn read(text: &str) -> Option<u128> {
    let end = text.find(|character: char| !character.is_ascii_digit() && character != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at_checked(end)?;
    let factor: u128 = match unit {
        "m" => 1,
        "" => 1_000,
        "k" => 1_000_000,
        "M" => 1_000_000_000,
        "G" => 1_000_000_000_000,
        "T" => 1_000_000_000_000_000,
        "Ki" => 1_000 << 10,
        "Mi" => 1_000 << 20,
        "Gi" => 1_000 << 30,
        "Ti" => 1_000 << 40,
        _unknown => return None,
    };
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || part.len() > DIGITS_MAX || part.contains('.') || (part.is_empty() && number.contains('.')) {
        return None;
    }
    let scale = 10_u128.checked_pow(u32::try_from(part.len()).ok()?)?;
    let part = if part.is_empty() { 0 } else { part.parse::<u128>().ok()? };
    let whole = whole.parse::<u128>().ok()?.checked_mul(scale)?.checked_add(part)?;
    Some(whole.checked_mul(factor)? / scale)
}

/// Digits behind the point.
const DIGITS_MAX: usize = 6;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_read_as_kubernetes_writes_them() {
        for (text, amount) in [
            ("100m", Some(100)),
            ("1", Some(1_000)),
            ("0.5", Some(500)),
            ("1.5Gi", Some(1_536 * 1_024 * 1_024 * 1_000)),
            ("64Mi", Some(64 * 1_024 * 1_024 * 1_000)),
            ("2k", Some(2_000_000)),
            ("0", None),
            ("", None),
            ("m", None),
            (".5", None),
            ("1.", None),
            ("1.2.3", None),
            ("-1", None),
            ("1 Gi", None),
            ("64MB", None),
            ("340282366920938463463374607431768211455Ti", None),
        ] {
            assert_eq!(thousandths(text), amount, "{text}");
        }
    }

    #[test]
    fn a_part_is_added_in_the_place_of_a_former_one_and_written_in_the_largest_unit_that_keeps_it_whole() {
        for (whole, former, part, now) in [
            ("50m", "0", "10m", Some("60m")),
            ("1", "0", "10m", Some("1010m")),
            ("1990m", "0", "10m", Some("2")),
            ("64Mi", "0", "32Mi", Some("96Mi")),
            ("1Gi", "0", "32Mi", Some("1056Mi")),
            ("992Mi", "0", "32Mi", Some("1Gi")),
            ("1000", "0", "1Ki", Some("2024")),
            ("64M", "0", "32M", Some("96000000")),
            ("96Mi", "32Mi", "64Mi", Some("128Mi")),
            ("10m", "20m", "5m", Some("5m")),
            ("0", "0", "10m", Some("10m")),
            ("1e3", "0", "10m", None),
            ("1", "0", "much", None),
        ] {
            assert_eq!(instead(whole, former, part).as_deref(), now, "{whole} - {former} + {part}");
        }
    }
}
