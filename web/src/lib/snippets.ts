/** The request on screen as code. A key is never in it: the code reads $PRELUDE_API_KEY. */
import type { ManyBody } from './comparison.svelte';

export const LANGUAGES = ['curl', 'Python', 'OpenAI client', 'Shell'] as const;
export type Language = (typeof LANGUAGES)[number];

/** A request that a screen sends, for View code. */
export interface ScreenRequest {
  /** What it does, as a comment. */
  about: string;
  method: 'GET' | 'POST' | 'PUT' | 'DELETE';
  /** With its query, as `pathOf` makes it. */
  path: string;
  json?: unknown;
  /** Fields of a form, and the names of its files by their fields. */
  form?: Record<string, string>;
  files?: Record<string, string | string[]>;
  /** The same from the shell, without the server's address. */
  command?: string;
}

/** A path of plain parts, which are encoded. */
export const pathOf = (...parts: (string | number)[]): string =>
  parts.map((part) => `/${encodeURIComponent(part)}`).join('');

export const shell = (text: string): string => `'${text.replaceAll("'", `'\\''`)}'`;

/** JSON as a Python literal. */
function python(value: unknown, indent = 0): string {
  if (value === null || value === undefined) return 'None';
  if (typeof value === 'boolean') return value ? 'True' : 'False';
  if (typeof value !== 'object') return JSON.stringify(value);
  const inner = ' '.repeat(indent + 4);
  const items = Array.isArray(value)
    ? value.map((item) => python(item, indent + 4))
    : Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${python(item, indent + 4)}`);
  const [open, close] = Array.isArray(value) ? '[]' : '{}';
  const line = `${open}${items.join(', ')}${close}`;
  return line.length < 80
    ? line
    : `${open}\n${items.map((item) => `${inner}${item},\n`).join('')}${' '.repeat(indent)}${close}`;
}

function curl(base: string, body: ManyBody, withKey: boolean): string {
  const key = withKey ? ` \\\n  -H "Authorization: Bearer $PRELUDE_API_KEY"` : '';
  return `curl -sN ${base}/generate_many${key} \\\n  -H 'Content-Type: application/json' \\\n  -d ${shell(JSON.stringify(body, null, 2))}`;
}

function requests(base: string, body: ManyBody, withKey: boolean): string {
  const key = withKey ? `\n    headers={"Authorization": f"Bearer {os.environ['PRELUDE_API_KEY']}"},` : '';
  return `import json
${withKey ? 'import os\n' : ''}
import httpx

body = ${python(body)}

with httpx.stream(
    "POST",
    ${JSON.stringify(`${base}/generate_many`)},
    json=body,${key}
    timeout=60,
) as reply:
    reply.raise_for_status()
    for line in reply.iter_lines():
        if line.startswith("data:"):
            event = json.loads(line.removeprefix("data:"))
            print(event["target"], event)`;
}

/** Chats apply a task's template; the frozen model continues the text as it is, which is a completion. */
function openai(base: string, body: ManyBody, model: string, withKey: boolean): string {
  const key = withKey ? 'os.environ["PRELUDE_API_KEY"]' : '"none"';
  const tasks = body.targets.flatMap(({ task }) => task ?? []);
  const isFrozen = body.targets.some(({ task }) => !task);
  const { max_new_tokens: most, temperature, choices } = body.parameters ?? {};
  const options = (indent: string) =>
    [
      most ? `max_tokens=${most}` : '',
      temperature ? `temperature=${temperature}` : '',
      choices ? `extra_body={"structured_outputs": {"choice": ${python(choices, indent.length)}}}` : '',
    ]
      .filter(Boolean)
      .map((option) => `\n${indent}${option},`)
      .join('');
  const chats = `
for task in ${python(tasks)}:
    reply = client.chat.completions.create(
        model=task,
        messages=[{"role": "user", "content": text}],${options('        ')}
    )
    print(task, reply.choices[0].message.content)
`;
  const completion = `
reply = client.completions.create(
    model=${JSON.stringify(model)},
    prompt=text,${options('    ')}
)
print(${JSON.stringify(model)}, reply.choices[0].text)
`;
  return `${withKey ? 'import os\n\n' : ''}from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(`${base}/v1`)}, api_key=${key})
text = ${python(body.inputs)}
${tasks.length ? chats : ''}${isFrozen ? completion : ''}`;
}

export function snippet(language: Language, base: string, body: ManyBody, model: string, withKey: boolean): string {
  if (language === 'curl') return curl(base, body, withKey);
  return language === 'Python' ? requests(base, body, withKey) : openai(base, body, model, withKey);
}

function curlOf(base: string, request: ScreenRequest, withKey: boolean): string {
  const method =
    request.method === 'GET' || (request.method === 'POST' && hasBody(request)) ? '' : ` -X ${request.method}`;
  const fields = [
    ...Object.entries(request.form ?? {}).map(([name, value]) => `--form-string ${shell(`${name}=${value}`)}`),
    ...filesOf(request).map(([name, file]) => `-F ${shell(`${name}=@"${file.replaceAll('"', '\\"')}"`)}`),
  ];
  if (withKey) fields.unshift('-H "Authorization: Bearer $PRELUDE_API_KEY"');
  if (request.json !== undefined) {
    fields.push("-H 'Content-Type: application/json'", `-d ${shell(JSON.stringify(request.json))}`);
  }
  return [`# ${request.about}\ncurl -s${method} ${shell(base + request.path)}`, ...fields].join(' \\\n  ');
}

/** The files of a form, by their fields; a field may have several. */
const filesOf = ({ files }: ScreenRequest): [string, string][] =>
  Object.entries(files ?? {}).flatMap(([name, of]) => [of].flat().map((file): [string, string] => [name, file]));

const hasBody = ({ json, form, files }: ScreenRequest): boolean => json !== undefined || Boolean(form ?? files);

function pythonOf(request: ScreenRequest): string {
  const files = filesOf(request).map(
    ([name, file]) => `(${JSON.stringify(name)}, open(${JSON.stringify(file)}, "rb"))`,
  );
  const given = [
    JSON.stringify(request.path),
    request.json === undefined ? '' : `json=${python(request.json, 4)}`,
    request.form && Object.keys(request.form).length ? `data=${python(request.form, 4)}` : '',
    files.length ? `files=[${files.join(', ')}]` : '',
  ].filter(Boolean);
  const line = `reply = client.${request.method.toLowerCase()}(${given.join(', ')})`;
  const call =
    line.length < 100 ? line : `reply = client.${request.method.toLowerCase()}(\n    ${given.join(',\n    ')},\n)`;
  return `# ${request.about}\n${call}\nreply.raise_for_status()\nprint(reply.text)`;
}

/** Requests of a screen as code, one after the other. */
export function screenSnippet(
  language: 'curl' | 'Python' | 'Shell',
  base: string,
  requests: ScreenRequest[],
  withKey: boolean,
): string {
  if (language === 'Shell') {
    const key = withKey ? '# the key is read from $PRELUDE_API_KEY\n' : '';
    const commands = requests.flatMap(({ about, command }) => (command ? `# ${about}\n${command}` : []));
    return `${key}export PRELUDE_URL=${shell(base)}\n\n${commands.join('\n\n')}`;
  }
  if (language === 'curl') return requests.map((request) => curlOf(base, request, withKey)).join('\n\n');
  const key = withKey ? `, headers={"Authorization": f"Bearer {os.environ['PRELUDE_API_KEY']}"}` : '';
  return `${withKey ? 'import os\n\n' : ''}import httpx

client = httpx.Client(base_url=${JSON.stringify(base)}${key}, timeout=60)

${requests.map(pythonOf).join('\n\n')}`;
}
