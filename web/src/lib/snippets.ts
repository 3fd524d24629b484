/** The request on screen as code. A key is never in it: the code reads $PRELUDE_API_KEY. */
import type { ManyBody } from './comparison.svelte';

export const LANGUAGES = ['curl', 'Python', 'OpenAI client'] as const;
export type Language = (typeof LANGUAGES)[number];

const shell = (text: string): string => `'${text.replaceAll("'", `'\\''`)}'`;

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
