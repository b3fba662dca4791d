//! Protobuf's wire format, field by field, so that data of a peer can be checked without being built.
//!
//! The format is <https://protobuf.dev/programming-guides/encoding/>.

/// Why bytes are malformed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub String);

/// A field of a message.
#[derive(Clone, Copy)]
pub(crate) struct Field<'a> {
    pub(crate) number: u64,
    pub(crate) wire: Wire<'a>,
}

/// The value of a field.
#[derive(Clone, Copy)]
pub(crate) enum Wire<'a> {
    Varint(u64),
    Fixed64(u64),
    Bytes(&'a [u8]),
    Fixed32,
}

/// The fields of one encoded message, in order.
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl<'a> Fields<'a> {
    /// The next field.
    ///
    /// # Errors
    /// The next bytes are not a field.
    pub(crate) fn next(&mut self) -> Result<Option<Field<'a>>, Malformed> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let key = self.varint()?;
        let number = key >> 3;
        if number == 0 || number > 0x1fff_ffff {
            return Err(malformed("has a field number that protobuf does not allow"));
        }
        let wire = match key & 7 {
            0 => Wire::Varint(self.varint()?),
            1 => {
                let bytes = self.take(8)?;
                Wire::Fixed64(bytes.iter().rev().fold(0, |bits, byte| bits << 8 | u64::from(*byte)))
            }
            2 => {
                let len = usize::try_from(self.varint()?).map_err(|_| malformed("ends too early"))?;
                Wire::Bytes(self.take(len)?)
            }
            5 => {
                self.take(4)?;
                Wire::Fixed32
            }
            _ => return Err(malformed("has a wire type that is not supported")),
        };
        Ok(Some(Field { number, wire }))
    }

    fn varint(&mut self) -> Result<u64, Malformed> {
        let mut value = 0;
        for shift in (0..70).step_by(7) {
            let byte = self.take(1)?[0];
            // The tenth byte has the last bit of 64.
            if shift == 63 && byte > 1 {
                break;
            }
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(malformed("has a number of more than 64 bits"))
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or_else(|| malformed("ends too early"))?;
        self.0 = rest;
        Ok(taken)
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Field<'a>;

    fn next(&mut self) -> Option<Field<'a>> {
        Fields::next(self).ok().flatten()
    }
}

pub(super) fn malformed(problem: &str) -> Malformed {
    Malformed(problem.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first(bytes: &[u8]) -> Result<Option<Field<'_>>, Malformed> {
        Fields(bytes).next()
    }

    #[test]
    fn a_number_has_64_bits_at_most() {
        let varint = |last: u8| [&[8][..], &[0xff; 9], &[last]].concat();
        let largest = varint(1);
        assert!(matches!(first(&largest), Ok(Some(Field { number: 1, wire: Wire::Varint(u64::MAX) }))));
        assert!(first(&varint(2)).is_err() && first(&varint(0x81)).is_err());
        // The ninth byte may have any of its bits.
        let nine = [&[8][..], &[0x80; 8], &[0x40]].concat();
        assert!(matches!(first(&nine), Ok(Some(Field { wire: Wire::Varint(bits), .. })) if bits == 1 << 62));
    }

    #[test]
    fn field_numbers_are_those_of_protobuf() {
        let key = |number: u64| {
            let mut bytes = Vec::new();
            prost::encoding::encode_varint(number << 3, &mut bytes);
            bytes.push(0);
            bytes
        };
        for (number, is_allowed) in [(0, false), (1, true), (0x1fff_ffff, true), (0x2000_0000, false), (1 << 40, false)]
        {
            assert_eq!(first(&key(number)).is_ok(), is_allowed, "{number}");
        }
    }

    #[test]
    fn a_field_of_each_wire_type_is_read_whole() {
        let bytes = b"\x08\x01\x11\x01\x02\x00\x00\x00\x00\x00\x00\x1a\x02ab\x25\x01\x02\x03\x04\x28\x07";
        let numbers: Vec<_> = Fields(bytes).map(|field| field.number).collect();
        assert_eq!(numbers, [1, 2, 3, 4, 5]);
        assert!(matches!(Fields(bytes).nth(1), Some(Field { wire: Wire::Fixed64(0x201), .. })));
        // Groups are not supported.
        assert!(first(b"\x0b").is_err());
    }
}
