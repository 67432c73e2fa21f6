//! The words in which the device is told how rows' tokens are chosen.

use crate::Draw;

/// Words that one row's draw takes.
pub const DRAW_WORDS: usize = 10;
/// Words that an edit takes.
pub const EDIT_WORDS: usize = 4;

/// The rows' draws and all their edits as `kernels/sample.cu` reads them; the first edit will be the one with number
/// `first`, counted in edits from wherever the kernel is told that they begin.
pub fn pack(draws: &[Draw], first: usize) -> (Vec<u32>, Vec<u32>) {
    let mut packed = Vec::with_capacity(draws.len() * DRAW_WORDS);
    let mut edits = Vec::new();
    for draw in draws {
        let begin = first + edits.len() / EDIT_WORDS;
        for edit in &draw.edits {
            edits.extend([edit.token, edit.in_prompt.into(), edit.generated, edit.bias.to_bits()]);
        }
        let end = first + edits.len() / EDIT_WORDS;
        packed.extend([draw.temperature.to_bits(), draw.top_k]);
        packed.extend([draw.top_p, draw.min_p, draw.point].map(f32::to_bits));
        packed.extend([begin as u32, end as u32]);
        packed.extend([draw.repetition, draw.presence, draw.frequency].map(f32::to_bits));
    }
    (packed, edits)
}
