// The ways of arrows: they leave a unit at an edge, pass the rows between through gaps, and run through no unit.
const HEAD = 7, APART = 6, EDGE = 3, PORT = 12;

// Rows of units from the top down, with what is free beside and between their units.
function rowsOf(places, width) {
  const rows = new Map();
  for (const place of places.values()) {
    if (!rows.has(place.y)) rows.set(place.y, []);
    rows.get(place.y).push(place);
  }
  return [...rows].sort(([a], [b]) => a - b).map(([y, units]) => {
    const gaps = [];
    let left = 0;
    for (const unit of [...units].sort((a, b) => a.x - b.x)) {
      if (unit.x - left >= 2 * EDGE) gaps.push({ low: left + EDGE, high: unit.x - EDGE, users: [] });
      left = unit.x + unit.width;
    }
    if (width - left >= 2 * EDGE || !gaps.length) gaps.push({ low: Math.min(width, left + EDGE), high: Math.max(width - EDGE, left), users: [] });
    return { y, bottom: y + Math.max(...units.map((unit) => unit.height)), units, gaps };
  });
}

const clamp = (x, low, high) => Math.max(low, Math.min(high, x));

// Moves sorted numbers as little as possible so that neighbours are `least` apart, or evenly over low..high if they do not fit.
export function apart(sorted, low, high, least) {
  const step = Math.min(least, (high - low) / Math.max(1, sorted.length - 1)), found = sorted.map((x) => clamp(x, low, high));
  for (let i = 1; i < found.length; i += 1) found[i] = Math.max(found[i], found[i - 1] + step);
  let limit = high;
  for (let i = found.length - 1; i >= 0; i -= 1) {
    found[i] = Math.min(found[i], limit);
    limit = found[i] - step;
  }
  return found;
}

// Where the ends of arrows stand on an edge of a unit: side by side, in the order in which the other ends stand.
function setPorts(ways) {
  const edges = new Map();
  for (const way of ways) {
    for (const [end, other] of [["from", "to"], ["to", "from"]]) {
      const above = end === "from" ? way.up || way.level : !way.up, key = `${way[end].x},${way[end].y},${above}`;
      if (!edges.has(key)) edges.set(key, []);
      edges.get(key).push({ way, end, x: way[other].x + way[other].width / 2 });
    }
  }
  for (const ends of edges.values()) {
    const { x, width } = ends[0].way[ends[0].end], centre = x + width / 2, half = Math.min(0.35 * width, (PORT * (ends.length - 1)) / 2);
    ends.sort((a, b) => a.x - b.x);
    ends.forEach(({ way, end, x: other }, i) => {
      const beside = ends.length > 1 ? centre - half + (2 * half * i) / (ends.length - 1) : centre;
      way[`${end}X`] = way[end].wide ? clamp(other, x + 10, x + width - 10) : beside;
    });
  }
}

function setGaps(way, rows) {
  const a = rows.findIndex((row) => row.y === way.from.y), b = rows.findIndex((row) => row.y === way.to.y);
  const between = a > b ? rows.slice(b + 1, a).reverse() : rows.slice(a + 1, b);
  let x = way.fromX;
  way.passes = between.map((row, i) => {
    // Straight on where that is free, else towards the end of the arrow.
    const wished = row.gaps.some(({ low, high }) => low <= x && x <= high) ? x : x + (way.toX - x) / (between.length - i + 1);
    const gap = row.gaps.reduce((best, one) => (Math.abs(clamp(wished, one.low, one.high) - wished) < Math.abs(clamp(wished, best.low, best.high) - wished) ? one : best));
    x = clamp(wished, gap.low, gap.high);
    const pass = { row, x };
    gap.users.push(pass);
    return pass;
  });
}

function drawn(way) {
  const { up, level, fromX, toX, from, to } = way;
  if (way.beside) {
    const right = to.x > from.x, y = from.y + from.height / 2, head = right ? to.x - HEAD : to.x + to.width + HEAD;
    return `M${right ? from.x + from.width : from.x},${y}L${head},${y}`;
  }
  let y = up || level ? from.y : from.y + from.height, d = `M${fromX},${y}`, x = fromX;
  const curve = (nextX, nextY) => {
    const bend = (nextY - y) / 2;
    d += `C${x},${y + bend} ${nextX},${nextY - bend} ${nextX},${nextY}`;
    [x, y] = [nextX, nextY];
  };
  for (const { row, x: through } of way.passes) {
    curve(through, up ? row.bottom : row.y);
    y = up ? row.y : row.bottom;
    d += `L${x},${y}`;
  }
  if (level) return `${d}C${x},${y - 34} ${toX},${to.y - HEAD - 34} ${toX},${to.y - HEAD}`;
  curve(toX, up ? to.y + to.height + HEAD : to.y - HEAD);
  return d;
}

// The path of every arrow, given as [place it leaves, place it enters]; `wide` places take arrows anywhere on their edge.
export function routes(ends, places, width) {
  const rows = rowsOf(places, width);
  const ways = ends.map(([from, to]) => {
    const level = from.y === to.y, units = rows.find((row) => row.y === from.y).units;
    const inside = (unit) => unit !== from && unit !== to && (unit.x - from.x) * (unit.x - to.x) < 0;
    return { from, to, up: from.y > to.y, level, beside: level && !units.some(inside), passes: [] };
  });
  const routed = ways.filter((way) => !way.beside);
  setPorts(routed);
  for (const way of routed) setGaps(way, rows);
  for (const { low, high, users } of rows.flatMap((row) => row.gaps)) {
    users.sort((a, b) => a.x - b.x);
    apart(users.map((pass) => pass.x), low, high, APART).forEach((x, i) => { users[i].x = x; });
  }
  return ways.map(drawn);
}
