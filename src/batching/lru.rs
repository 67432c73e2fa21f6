//! Blocks in the order in which they were last used.

use super::BlockId;

/// A doubly linked list of blocks whose links lie in an array by block: every operation takes constant time.
#[derive(Debug, Default)]
pub struct LruList {
    first: Option<BlockId>,
    last: Option<BlockId>,
    len: usize,
    links: Vec<Link>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Link {
    before: Option<BlockId>,
    after: Option<BlockId>,
}

impl LruList {
    pub fn len(&self) -> usize {
        self.len
    }

    /// Adds a block that is not in the list, as the most recently used.
    pub fn push(&mut self, block: BlockId) {
        let place = block as usize;
        if self.links.len() <= place {
            self.links.resize(place + 1, Link::default());
        }
        self.links[place] = Link {
            before: self.last,
            after: None,
        };
        match self.last {
            Some(last) => self.links[last as usize].after = Some(block),
            None => self.first = Some(block),
        }
        self.last = Some(block);
        self.len += 1;
    }

    /// Takes out a block that is in the list.
    pub fn remove(&mut self, block: BlockId) {
        let Link { before, after } = self.links[block as usize];
        match before {
            Some(before) => self.links[before as usize].after = after,
            None => self.first = after,
        }
        match after {
            Some(after) => self.links[after as usize].before = before,
            None => self.last = before,
        }
        self.len -= 1;
    }

    /// All blocks, the most recently used first.
    pub fn latest_first(&self) -> impl Iterator<Item = BlockId> {
        std::iter::successors(self.last, |&block| self.links[block as usize].before)
    }

    /// Takes out the least recently used block.
    pub fn pop(&mut self) -> Option<BlockId> {
        let block = self.first?;
        self.remove(block);
        Some(block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_goes_first_wherever_others_were_taken_out() {
        let mut list = LruList::default();
        for block in [3, 0, 5, 2, 9] {
            list.push(block);
        }
        for block in [3, 5, 9] {
            list.remove(block);
        }
        list.push(5);
        assert_eq!(list.len(), 3);
        assert_eq!(list.latest_first().collect::<Vec<_>>(), [5, 2, 0]);
        assert_eq!(
            [list.pop(), list.pop(), list.pop(), list.pop()],
            [Some(0), Some(2), Some(5), None]
        );
        list.push(1);
        assert_eq!((list.pop(), list.len()), (Some(1), 0));
    }
}
