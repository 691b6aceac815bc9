"""What the data pipeline's counters mean, in words for the page."""

REASONS = {
  "empty_response": "a response has no text, so there is nothing to score",
  "identical_responses": "chosen and rejected are the same text",
  "identical_after_cut": "chosen and rejected are the same once cut to length",
  "empty_prompt": "the prompt has no text",
  "wrong_shape": "fields of the detected format are missing or of another type",
  "bad_value": "a value cannot be used, such as a label neither true nor false",
  "bad_text": "the text is not valid Unicode",
  "prompt_cut": "the prompt was too long: its beginning was cut",
  "response_cut": "a response was too long: its end was cut",
  "boundary_moved": "the tokenizer merged text across the end of the prompt;"
  " the split moved to the last token that both sides share",
  "opening_left_out": "the chat template does not begin an answered turn as it"
  " opens one; the prompt ends where all answers begin",
  "extra_turns": "turns after the scored response were left out",
  "undesirable_skipped": "this method learns from desirable examples only",
}
