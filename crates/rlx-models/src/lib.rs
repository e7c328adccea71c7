//! Model families: config and tensor names to graph, tokenizer, sampling, generation.
