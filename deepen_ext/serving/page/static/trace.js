// The page of a trace: its texts one below the other. Or, where the page holds none, that of a server.

function showTrace(records) {
  const answers = document.getElementById("answers");
  const byRow = new Map();
  for (const record of records) {
    if (!byRow.has(record.row)) byRow.set(record.row, []);
    byRow.get(record.row).push(record);
  }
  const rows = [...byRow.keys()].sort((a, b) => a - b);
  for (const row of rows) {
    const answer = new Answer(rows.length > 1 ? `Text ${row + 1}` : "Text");
    answers.append(answer.root);
    for (const record of byRow.get(row)) answer.add(record, record.text ?? record.token.text);
    answer.status.textContent = answer.summary(byRow.get(row).length);
  }
}

const traced = document.getElementById("trace");
if (traced) showTrace(JSON.parse(traced.textContent));
else LIVE.begin();
