import { describe, expect, it } from 'vitest';
import { LANGUAGES, snippet } from './snippets';

const body = {
  inputs: `it's "quoted" $HOME \\ 'x'`,
  targets: [{ task: 'mood@2' }, {}],
  parameters: { max_new_tokens: 5, details: true },
};

describe('the request as code', () => {
  it('names what is asked, and never a key', () => {
    for (const language of LANGUAGES) {
      expect(snippet(language, 'http://127.0.0.1:8000', body, 'frozen', false)).not.toContain('API_KEY');
      const code = snippet(language, 'http://127.0.0.1:8000', body, 'frozen', true);
      expect(code).toContain('mood@2');
      expect(code).toContain('PRELUDE_API_KEY');
    }
  });
  it('quotes a text for the shell', () => {
    expect(snippet('curl', 'http://h', { inputs: "it's", targets: [{}] }, 'm', false)).toContain("it'\\''s");
  });
  it('writes Python literals', () => {
    expect(snippet('Python', 'http://h', body, 'm', false)).toContain('"details": True');
  });
});
