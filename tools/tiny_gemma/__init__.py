"""How the embedded tiny Gemma is made: the words it knows, the skills it has, the text it reads, its tokenizer."""
