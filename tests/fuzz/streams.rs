//! Any stream of token ids, cut anywhere: the text that comes piece by piece is the text of the whole.

use proptest::prelude::*;
use sconce::text::{Detokenizer, Start, StopMatcher};

use super::{TOKENIZER, config, within_memory};

fn ids() -> impl Strategy<Value = Vec<u32>> {
    let of = |text: String| TOKENIZER.encode(&text, false).expect("text has tokens");
    let id = prop_oneof![
        4 => 0..49_152u32,
        1 => any::<u32>(),
        // Ids of single bytes and of parts of characters stand at the beginning of the vocabulary.
        4 => 0..400u32,
    ];
    prop_oneof![
        prop::collection::vec(id, 0..60),
        // Characters of several tokens, with tokens lost, doubled and in another order.
        (
            "[😀漢é🦀a ]{1,12}",
            any::<prop::sample::Index>(),
            any::<prop::sample::Index>()
        )
            .prop_map(move |(text, a, b)| {
                let mut ids = of(text);
                let (a, b) = (a.index(ids.len()), b.index(ids.len()));
                ids.swap(a, b);
                ids.remove(a);
                ids
            }),
    ]
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn a_stream_is_its_whole_text(ids in ids()) {
        let pieces = within_memory(|| {
            let mut stream = Detokenizer::new(TOKENIZER.clone(), Start::Text);
            let mut pieces: Vec<String> = ids.iter().map(|id| stream.push(*id)).collect();
            pieces.push(stream.finish());
            pieces
        });
        prop_assert_eq!(pieces.concat(), TOKENIZER.decode(&ids, false));
    }

    #[test]
    fn a_stop_string_is_found_wherever_the_stream_is_cut(
        ids in ids(), stops in prop::collection::vec("[a-c é漢]{1,3}", 0..4)
    ) {
        let text = within_memory(|| {
            let mut stream = Detokenizer::new(TOKENIZER.clone(), Start::Text);
            let mut matcher = StopMatcher::new(stops.clone());
            let mut text: String = ids.iter().map(|id| matcher.push(&stream.push(*id))).collect();
            text += &matcher.push(&stream.finish());
            text + &matcher.finish()
        });
        let whole = TOKENIZER.decode(&ids, false);
        // The match that ends first counts, and of several that end there the longest.
        let matches = stops.iter().filter_map(|stop| whole.find(stop.as_str()).map(|at| (at + stop.len(), at)));
        let first = matches.min().map(|(_, start)| start);
        prop_assert_eq!(text.as_str(), &whole[..first.unwrap_or(whole.len())]);
    }
}
