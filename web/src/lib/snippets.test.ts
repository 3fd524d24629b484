import { describe, expect, it } from 'vitest';
import { LANGUAGES, pathOf, screenSnippet, snippet, type ScreenRequest } from './snippets';

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

describe('the requests of a screen as code', () => {
  const requests: ScreenRequest[] = [
    { about: 'read it', method: 'GET', path: `${pathOf('prompts', 'a/b')}?version=1` },
    { about: 'change it', method: 'PUT', path: '/prompts/mood/traffic', json: { 1: 90, 2: 10 } },
    {
      about: 'send a file',
      method: 'POST',
      path: '/i',
      form: { limit: '5', task: "@it's" },
      files: { data: 'r".jsonl' },
      command: "prelude send 'x'",
    },
  ];
  it('are commands for a shell', () => {
    const code = screenSnippet('curl', 'http://h', requests, false);
    expect(code).toContain("curl -s 'http://h/prompts/a%2Fb?version=1'");
    expect(code).toContain(`-X PUT 'http://h/prompts/mood/traffic'`);
    expect(code).toContain(`-d '{"1":90,"2":10}'`);
    // A value that begins with @ is no file.
    expect(code).toContain(`--form-string 'task=@it'\\''s'`);
    expect(code).toContain(`-F 'data=@"r\\".jsonl"'`);
    expect(code).not.toContain('API_KEY');
  });
  it('are commands of prelude, where there are such', () => {
    const code = screenSnippet('Shell', 'http://h', requests, true);
    expect(code).toContain("export PRELUDE_URL='http://h'");
    expect(code).toContain("# send a file\nprelude send 'x'");
    expect(code).not.toContain('read it');
  });
  it('send several files in one field', () => {
    const put: ScreenRequest[] = [{ about: 'a', method: 'PUT', path: '/p', files: { files: ['a.json', 'b.json'] } }];
    expect(screenSnippet('curl', 'http://h', put, false)).toContain(`-F 'files=@"a.json"' \\\n  -F 'files=@"b.json"'`);
    expect(screenSnippet('Python', 'http://h', put, false)).toContain('("files", open("b.json", "rb"))');
  });
  it('are Python, with the key from the environment', () => {
    const code = screenSnippet('Python', 'http://h', requests, true);
    expect(code).toContain('client.put("/prompts/mood/traffic", json={"1": 90, "2": 10})');
    expect(code).toContain('files=[("data", open("r\\".jsonl", "rb"))]');
    expect(code).toContain('PRELUDE_API_KEY');
  });
});
