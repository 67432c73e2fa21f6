//! What a step's kernels need to know, as one row of words that reaches the device in one copy.

use std::ops::Range;

use candle_core::{Result, bail};

use super::draw::{DRAW_WORDS, NO_SLOT, PAIR_WORDS, SET_WORDS, SlotRoom, pack};
use crate::{Draw, Span, Step};

/// Set in a token that the step before chose; the rest is its row there (`kernels/common.cuh`).
pub const CARRIED: u32 = 1 << 31;
/// Rows of a tile of queries in `kernels/attention_prefill.cu`.
pub const TILE_ROWS: usize = 64;

/// Sizes on which the places of the lists depend, and all that the kernels' launches depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    pub tokens: usize,
    /// Queries that attend alone.
    pub decodes: usize,
    /// Tiles of queries that attend together.
    pub tiles: usize,
    /// Rows whose logits are wanted.
    pub rows: usize,
}

/// Where each list begins, in words. The block tables, the draws' biases and what slots are set to follow behind the last.
#[derive(Debug, Clone, Copy)]
pub struct Places {
    pub tokens: usize,
    pub positions: usize,
    pub slots: usize,
    pub decode_rows: usize,
    pub decode_lengths: usize,
    pub decode_tables: usize,
    /// First row, first position, tokens, table and first row within the span, a list each.
    pub tiles: [usize; 5],
    pub rows: usize,
    pub draws: usize,
    end: usize,
}

impl Shape {
    pub fn places(&self) -> Places {
        let mut end = 0;
        let mut list = |len: usize| {
            let at = end;
            end += len;
            at
        };
        Places {
            tokens: list(self.tokens),
            positions: list(self.tokens),
            slots: list(self.tokens),
            decode_rows: list(self.decodes),
            decode_lengths: list(self.decodes),
            decode_tables: list(self.decodes),
            tiles: std::array::from_fn(|_| list(self.tiles)),
            rows: list(self.rows),
            draws: list(self.rows * DRAW_WORDS),
            end: list(0),
        }
    }
}

/// A step as the device is told of it.
#[derive(Debug)]
pub struct Metadata {
    pub shape: Shape,
    pub words: Vec<u32>,
    pub sets: Sets,
    /// The slots that its rows have.
    pub room: SlotRoom,
}

/// The list of slots that are set before the step's tokens are chosen. It depends on no shape: no graph has it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sets {
    pub count: usize,
    /// Where it begins, in words.
    pub place: usize,
}

impl Metadata {
    /// Lets the step take tokens, by their places, from rows of the step before, which had so many.
    pub fn carry(&mut self, tokens: &[(usize, usize)], rows: usize) -> Result<()> {
        for &(token, row) in tokens {
            if token >= self.shape.tokens || row >= rows {
                bail!("step: its token {token} is to be row {row} of {rows} rows before")
            }
            self.words[self.shape.places().tokens + token] = CARRIED | row as u32;
        }
        Ok(())
    }
}

/// What a step is packed for.
pub struct Packing {
    pub block_size: usize,
    /// Query heads that share a KV head.
    pub group: usize,
    /// Whether chunks attend in tiles; else each of their queries attends alone.
    pub tiles: bool,
    /// For a step of nothing but decodes: the number of rows to fill up to with padding.
    pub pad_to: Option<usize>,
}

impl Packing {
    /// Packs a step that was checked, and the draws of its logit rows; without `draws` the logits are left alone.
    pub fn pack(&self, step: &Step, draws: &[Draw]) -> Metadata {
        let shape = self.shape(step);
        let places = shape.places();
        let mut words = vec![0; places.end];
        words[places.slots..][..shape.tokens].fill(NO_SLOT);
        words[places.tokens..][..step.tokens.len()].copy_from_slice(&step.tokens);
        let mut lists = Lists {
            words,
            places,
            decodes: 0,
            tiles: 0,
            rows: 0,
        };
        let mut token = 0;
        for span in &step.sequences {
            let range = token..token + span.len;
            token = range.end;
            self.span(span, range, &mut lists);
        }
        // Padding writes its zeros into its own rows.
        for row in lists.decodes..shape.decodes {
            lists.words[places.decode_rows + row] = row as u32;
        }
        for row in lists.rows..shape.rows {
            lists.words[places.rows + row] = row as u32;
        }
        let sets = lists.draws(draws, shape.rows);
        Metadata {
            shape,
            words: lists.words,
            sets,
            room: SlotRoom::of(draws),
        }
    }

    fn shape(&self, step: &Step) -> Shape {
        let tiled = |span: &&Span| self.tiles && span.len > 1;
        let alone = step.sequences.iter().filter(|span| !tiled(span));
        let tiles = step.sequences.iter().filter(tiled);
        let pad = |count: usize| self.pad_to.map_or(count, |to| to.max(count));
        Shape {
            tokens: pad(step.tokens.len()),
            decodes: pad(alone.map(|span| span.len).sum()),
            tiles: tiles.map(|span| (span.len * self.group).div_ceil(TILE_ROWS)).sum(),
            rows: pad(step.sequences.iter().filter(|span| span.logits).count()),
        }
    }

    /// Whether a step is nothing but decodes, each of which wants logits: what can run as a graph.
    pub fn is_decode(step: &Step) -> bool {
        step.sequences.iter().all(|span| span.len == 1 && span.logits)
    }

    fn span(&self, span: &Span, tokens: Range<usize>, lists: &mut Lists) {
        let table = lists.words.len() as u32;
        lists.words.extend(&span.block_table);
        let places = lists.places;
        for (token, position) in tokens.clone().zip(span.start..) {
            let slot = span.block_table[position / self.block_size] as usize * self.block_size;
            lists.words[places.positions + token] = position as u32;
            lists.words[places.slots + token] = (slot + position % self.block_size) as u32;
        }
        if self.tiles && span.len > 1 {
            for offset in (0..span.len * self.group).step_by(TILE_ROWS) {
                let tile = [tokens.start, span.start, span.len, table as usize, offset];
                for (place, value) in places.tiles.iter().zip(tile) {
                    lists.words[place + lists.tiles] = value as u32;
                }
                lists.tiles += 1;
            }
        } else {
            for (token, position) in tokens.clone().zip(span.start..) {
                lists.words[places.decode_rows + lists.decodes] = token as u32;
                lists.words[places.decode_lengths + lists.decodes] = position as u32 + 1;
                lists.words[places.decode_tables + lists.decodes] = table;
                lists.decodes += 1;
            }
        }
        if span.logits {
            lists.words[places.rows + lists.rows] = tokens.end as u32 - 1;
            lists.rows += 1;
        }
    }
}

/// Words under way, and how many entries the lists have so far.
struct Lists {
    words: Vec<u32>,
    places: Places,
    decodes: usize,
    tiles: usize,
    rows: usize,
}

impl Lists {
    /// Draws, and behind everything their pairs, whose numbers count from the words' beginning, and what sets slots.
    fn draws(&mut self, draws: &[Draw], rows: usize) -> Sets {
        self.words.resize(self.words.len().next_multiple_of(PAIR_WORDS), 0);
        let packed = pack(draws, rows, self.words.len() / PAIR_WORDS);
        self.words[self.places.draws..][..packed.draws.len()].copy_from_slice(&packed.draws);
        self.words.extend(packed.pairs);
        let place = self.words.len();
        let count = packed.sets.len() / SET_WORDS;
        self.words.extend(packed.sets);
        Sets { count, place }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Count, Slot, State};

    fn span(start: usize, len: usize, block_table: &[u32], logits: bool) -> Span {
        Span {
            start,
            len,
            block_table: block_table.to_vec(),
            logits,
        }
    }

    fn list(metadata: &Metadata, place: usize, len: usize) -> &[u32] {
        &metadata.words[place..place + len]
    }

    #[test]
    fn a_mixed_step_has_tiles_and_decodes() {
        let step = Step {
            tokens: (10..52).collect(),
            sequences: vec![
                span(5, 1, &[9, 4], true),
                span(2, 40, &[7, 0, 1, 2, 3, 5, 6, 8, 10, 11, 12], false),
                span(0, 1, &[13], true),
            ],
        };
        let packing = Packing {
            block_size: 4,
            group: 2,
            tiles: true,
            pad_to: None,
        };
        let count = Count {
            token: 3,
            in_prompt: true,
            generated: 2,
        };
        let state = State {
            seed: 9,
            generated: 4,
            counts: vec![count],
        };
        let draw = |number, set, biases| Draw {
            temperature: 0.5,
            top_k: 4,
            frequency: 0.25,
            biases,
            slot: Some(Slot { number, set }),
            ..Draw::greedy()
        };
        let draws = [draw(2, None, vec![]), draw(1, Some(state), vec![(8, -0.5)])];
        let metadata = packing.pack(&step, &draws);
        let shape = Shape {
            tokens: 42,
            decodes: 2,
            tiles: 2,
            rows: 2,
        };
        assert_eq!(metadata.shape, shape);
        let places = metadata.shape.places();
        assert_eq!(list(&metadata, places.slots, 4), [17, 30, 31, 0]);
        assert_eq!(list(&metadata, places.positions, 3), [5, 2, 3]);
        assert_eq!(list(&metadata, places.decode_rows, 2), [0, 41]);
        assert_eq!(list(&metadata, places.decode_lengths, 2), [6, 1]);
        assert_eq!(list(&metadata, places.rows, 2), [0, 41]);
        assert_eq!(list(&metadata, places.tiles[4], 2), [0, 64]);
        let table = metadata.words[places.tiles[3]] as usize;
        assert_eq!(list(&metadata, table, 3), [7, 0, 1]);
        let second = list(&metadata, places.draws + DRAW_WORDS, DRAW_WORDS);
        let pairs = |range: &[u32]| &metadata.words[range[0] as usize * PAIR_WORDS..range[1] as usize * PAIR_WORDS];
        assert_eq!(second[4], 1);
        assert_eq!(pairs(&second[5..]), [8, (-0.5f32).to_bits()]);
        assert_eq!(metadata.sets.count, 1);
        let set = list(&metadata, metadata.sets.place, SET_WORDS);
        assert_eq!(set[..5], [1, 9, 0, 4, 1]);
        assert_eq!(pairs(&set[5..]), [3, 1 << 31 | 2]);
        assert_eq!(metadata.room, SlotRoom { slots: 3, counted: 3 });
        assert_eq!(second[7..], [1f32, 0.0, 0.25].map(f32::to_bits));
    }

    #[test]
    fn padding_stores_nothing_and_sees_nothing() {
        let step = Step {
            tokens: vec![1, 2],
            sequences: vec![span(0, 1, &[3], true), span(9, 1, &[2, 1], true)],
        };
        let packing = Packing {
            block_size: 8,
            group: 1,
            tiles: true,
            pad_to: Some(4),
        };
        assert!(Packing::is_decode(&step));
        let mut metadata = packing.pack(&step, &[]);
        let places = metadata.shape.places();
        metadata.carry(&[(1, 6)], 7).unwrap();
        assert_eq!(list(&metadata, places.tokens, 4), [1, CARRIED | 6, 0, 0]);
        assert!(metadata.carry(&[(1, 7)], 7).is_err());
        assert_eq!(list(&metadata, places.slots, 4), [24, 9, NO_SLOT, NO_SLOT]);
        assert_eq!(list(&metadata, places.decode_rows, 4), [0, 1, 2, 3]);
        assert_eq!(list(&metadata, places.rows, 4), [0, 1, 2, 3]);
        assert_eq!(list(&metadata, places.decode_lengths, 4), [1, 10, 0, 0]);
        let draws = list(&metadata, places.draws, 4 * DRAW_WORDS);
        assert!(draws.chunks(DRAW_WORDS).all(|draw| draw[4] == NO_SLOT));
    }
}
