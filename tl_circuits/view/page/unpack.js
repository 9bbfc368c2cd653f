// Makes a graph with fast look-ups from what Python wrote.
const KINDS = ["feature", "error", "embedding", "logit"];

function bytes(base64) {
  const text = atob(base64), made = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i += 1) made[i] = text.charCodeAt(i);
  return made;
}

export async function gunzip(base64) {
  const stream = new Blob([bytes(base64)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

export async function unpackJson(base64) {
  return JSON.parse(new TextDecoder().decode(await gunzip(base64)));
}

// For each node the indices of its links, strongest share first.
function byEnd(ends, share, n) {
  const lists = Array.from({ length: n }, () => []);
  ends.forEach((node, i) => lists[node].push(i));
  for (const list of lists) list.sort((a, b) => Math.abs(share[b]) - Math.abs(share[a]) || a - b);
  return lists;
}

export async function unpackGraph(data) {
  const raw = await gunzip(data.links);
  const { nodes } = data, n = nodes.kind.length, wide = n > 65536;
  const Index = wide ? Uint32Array : Uint16Array, size = wide ? 4 : 2;
  const count = raw.byteLength / (2 * size + 4);
  const source = new Index(raw, 0, count), target = new Index(raw, size * count, count);
  const weight = new Float32Array(raw.slice(2 * size * count));
  const share = weight.map((w, i) => w / Math.max(nodes.mass[target[i]], 1e-30));
  let logits = 0;
  const ids = nodes.kind.map((kind, i) => {
    const at = nodes.site?.[i] ? `L${nodes.layer[i]}.${nodes.site[i]}` : `L${nodes.layer[i]}`;
    if (kind === 0) return `${at}/F${nodes.feature[i]}@${nodes.position[i]}`;
    if (kind === 1) return `${at}/error@${nodes.position[i]}`;
    return kind === 2 ? `token@${nodes.position[i]}` : `logit:${logits++}`;
  });
  // 1 or -1: the sign of a link that pushes the feature the way it counts: its activation, or how that differs from the baseline.
  const towards = nodes.kind.map((kind, i) => (kind === 0 ? Math.sign(nodes.activation[i] - (nodes.baseline?.[i] ?? 0)) : 1));
  return {
    // Grows along every link: the layer, or layer and site where some layer has several dictionaries.
    depth: nodes.depth ?? nodes.layer,
    ...data, n, ids, source, target, weight, share, towards,
    kinds: nodes.kind.map((k) => KINDS[k]),
    indexOf: new Map(ids.map((id, i) => [id, i])),
    headStories: new Map(data.heads.map((story) => [`${story.source}>${story.target}`, story])),
    inputs: byEnd(target, share, n), outputs: byEnd(source, share, n),
  };
}
