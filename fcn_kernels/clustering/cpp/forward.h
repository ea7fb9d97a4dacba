// Chunks from rows to sums. A task has some tokens from one attention to the next, so that what is made of them stays
// in L2; every layer's weights do, too. What a chunk gets does not depend on how tokens are cut.

#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "attention.h"
#include "batch.h"
#include "calls.h"
#include "layer.h"
#include "sums.h"

namespace fcn_kernels {

constexpr int64_t TASK = 96;            // tokens, whole tiles of rows and of queries
constexpr int64_t BATCH_TOKENS = 1024;  // of chunks that go through together, or those of one longer chunk

struct Block {
    const Layer qkv, proj, fc1, fc2;
    const Acc* residual;  // (2, P), or null

    Block(const Call& c, int64_t l)
        : qkv(layer(c.qkv_weight, c.qkv_bias, c.qkv_panels, l, c.dim, 3 * c.dim)),
          proj(layer(c.proj_weight, c.proj_bias, c.proj_panels, l, c.dim, c.dim)),
          fc1(layer(c.fc1_weight, c.fc1_bias, c.fc1_panels, l, c.dim, 4 * c.dim)),
          fc2(layer(c.fc2_weight, c.fc2_bias, c.fc2_panels, l, 4 * c.dim, c.dim)),
          residual(c.residual ? c.residual + l * 2 * c.chunks : nullptr) {}

    static Layer layer(const Acc* weight, const Acc* bias, const Acc* panels, int64_t l, int64_t inputs,
                       int64_t outputs) {
        return Layer(weight + l * inputs * outputs, bias + l * outputs, inputs, outputs,
                     panels ? panels + l * panel_room(inputs, outputs) : nullptr);
    }
};

// Strides of a call's buffers.
struct Widths {
    const int64_t token, qkv, wide, head, logits;

    explicit Widths(const Call& c)
        : token(whole_tiles(c.dim)),
          qkv(whole_tiles(3 * c.dim)),
          wide(whole_tiles(4 * c.dim)),
          head(whole_channels(c.dim / c.heads)),
          logits(whole_tiles(c.clusters)) {}
};

// What a thread makes of the tokens of a task.
struct Scratch {
    const Aligned gathered, added, hidden, unit, wide;
    Attending attending;

    explicit Scratch(const Widths& w)
        : gathered(TASK * w.token),
          added(TASK * w.token),
          hidden(TASK * w.token),
          unit(TASK * w.token),
          wide(TASK * std::max({w.wide, w.qkv, w.logits})),
          attending(w.head) {}
};

// Of a batch, between attentions: hidden tokens, and queries, keys and values of the next.
struct Tokens {
    const int64_t room;  // tokens of a head
    const Aligned hidden, queries, keys[2], values[2];

    Tokens(const Call& c, const Widths& w, int64_t tokens)
        : room(tokens + TILE_KEYS),
          hidden(tokens * w.token),
          queries(tokens * w.token),
          keys{Aligned(size(c, w)), Aligned(c.depth > 1 ? size(c, w) : 0)},
          values{Aligned(size(c, w)), Aligned(c.depth > 1 ? size(c, w) : 0)} {}

    int64_t size(const Call& c, const Widths& w) const { return c.heads * room * w.head; }
};

class Forward {
  public:
    Forward(const Call& call, const Clustered& out)
        : call(call),
          out(out),
          widths(call),
          shares(call.weight, call.bias, call.dim, call.clusters, nullptr, -INFINITE) {
        for (int64_t l = 0; l < call.depth; ++l) blocks.emplace_back(new Block(call, l));
    }

    void run() {
        std::vector<int64_t> begins;
        int64_t size = 0, most = 0;
        for (int64_t p = 0; p < call.chunks; ++p) {
            const int64_t more = Span(call, p).size() + call.clusters;
            if (begins.empty() || size + more > BATCH_TOKENS) begins.push_back(p), size = 0;
            most = std::max(most, size += more);
        }
        begins.push_back(call.chunks);
        const int64_t threads = most <= TASK ? 1 : call.threads;
        for (int64_t t = 0; t < threads; ++t) scratch.emplace_back(new Scratch(widths));
        const Tokens room(call, widths, most);
        for (size_t i = 0; i + 1 < begins.size(); ++i) run_batch(room, begins[i], begins[i + 1]);
    }

  private:
    const Call& call;
    const Clustered& out;
    const Widths widths;
    const Layer shares;
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<std::unique_ptr<Scratch>> scratch;

    void run_batch(const Tokens& t, int64_t begin, int64_t end) {
        const Batch b(call, begin, end, scratch.size());
        for_tasks(b.every, [&](const int64_t* at, int64_t count, Scratch& s) {
            for (int64_t i = 0; i < count; ++i) embed(b, at[i], s.hidden + i * widths.token);
            hand_on(b, t, -1, at, count, s);
        });
        for (int64_t l = 0; l < call.depth; ++l)  // what the last block makes of the centers is dropped
            for_tasks(l + 1 < call.depth ? b.every : b.taken, [&](const int64_t* at, int64_t count, Scratch& s) {
                run_block(b, t, l, at, count, s);
                hand_on(b, t, l, at, count, s);
            });
        add_up(call, b, t.hidden, widths.token, out, begin, end, scratch.size());
    }

    // work(tokens, their number, scratch)
    template <class Work>
    void for_tasks(const std::vector<int64_t>& tokens, Work work) {
        const int64_t count = tokens.size(), tasks = (count + TASK - 1) / TASK, threads = scratch.size();
        Caught caught;
#pragma omp parallel for schedule(dynamic) num_threads(std::max<int64_t>(1, std::min(threads, tasks)))
        for (int64_t i = 0; i < tasks; ++i)
            caught.run(
                [&] { work(&tokens[i * TASK], std::min(TASK, count - i * TASK), *scratch[omp_get_thread_num()]); });
        caught.rethrow();
    }

    void embed(const Batch& b, int64_t token, Acc* to) const {
        std::fill(to + call.dim, to + widths.token, Acc(0));
        if (b.rows[token] < 0) {
            const Chunk& chunk = b.chunks[b.chunk_of[token]];
            std::copy_n(call.centers + (token - chunk.first - chunk.rows) * call.dim, call.dim, to);
            return;
        }
        const int64_t plain = call.dim - call.coded;
        const int64_t code = std::upper_bound(call.edges, call.edges + EDGES, b.norms[token]) - call.edges;
        if (plain) std::copy_n(call.styles + b.rows[token] * plain, plain, to);
        std::copy_n(call.table + code * call.coded, call.coded, to + plain);
    }

    // Hidden tokens of a task, from before block l to after it.
    void run_block(const Batch& b, const Tokens& t, int64_t l, const int64_t* at, int64_t count, Scratch& s) const {
        const Block& block = *blocks[l];
        attend_all(b, t, l % 2, at, count, s);
        block.proj.apply(s.gathered, widths.token, count, s.added, widths.token);
        for (int64_t i = 0; i < count; ++i) add(b, block, 0, at[i], t.hidden + at[i] * widths.token, i, s);
        for (int64_t i = 0; i < count; ++i)
            layer_norm(s.hidden + i * widths.token, call.dim, EPS_LAYER_NORM, s.unit + i * widths.token);
        block.fc1.apply(s.unit, widths.token, count, s.wide, widths.wide);
        for (int64_t i = 0; i < count * widths.wide; i += LANES) store_work(s.wide + i, gelu(load_work(s.wide + i)));
        block.fc2.apply(s.wide, widths.wide, count, s.added, widths.token);
        for (int64_t i = 0; i < count; ++i) add(b, block, 1, at[i], s.hidden + i * widths.token, i, s);
    }

    void attend_all(const Batch& b, const Tokens& t, int buffer, const int64_t* at, int64_t count, Scratch& s) const {
        const int64_t width = call.dim / call.heads;
        for (int64_t i = 0, run; i < count; i += run) {
            const Chunk& chunk = b.chunks[b.chunk_of[at[i]]];
            for (run = 1; run < QUERIES && i + run < count && b.chunk_of[at[i + run]] == b.chunk_of[at[i]];) ++run;
            for (int64_t head = 0; head < call.heads; ++head) {
                const int64_t place = (head * t.room + chunk.first) * widths.head;
                const Head h = {t.keys[buffer] + place, t.values[buffer] + place, chunk.rows + call.clusters,
                                widths.head};
                attend(h, t.queries + at[i] * widths.token + head * width, widths.token, run, width, s.attending,
                       s.gathered + i * widths.token + head * width, widths.token);
            }
        }
    }

    // hidden = before + factor added
    void add(const Batch& b, const Block& block, int part, int64_t token, const Acc* before, int64_t i,
             Scratch& s) const {
        const int64_t place = b.chunks[b.chunk_of[token]].place, at = i * widths.token;
        const Acc factor = block.residual ? block.residual[part * call.chunks + place] : Acc(1);
        for (int64_t c = 0; c < widths.token; c += LANES)
            store_work(s.hidden + at + c, load_work(before + c) + factor * load_work(s.added + at + c));
    }

    // Hidden tokens after block l, -1 for those that go into the first: to the next attention, or to the shares.
    void hand_on(const Batch& b, const Tokens& t, int64_t l, const int64_t* at, int64_t count, Scratch& s) const {
        const bool last = l + 1 == call.depth;
        for (int64_t i = 0; i < count; ++i) {
            const Acc* hidden = s.hidden + i * widths.token;
            layer_norm(hidden, call.dim, EPS_LAYER_NORM, s.unit + i * widths.token);
            std::copy_n(last ? s.unit + i * widths.token : hidden, widths.token, t.hidden + at[i] * widths.token);
            if (out.hidden && l >= 0) keep(b, l, at[i], hidden);
        }
        if (last) return share_out(b, at, count, s);
        blocks[l + 1]->qkv.apply(s.unit, widths.token, count, s.wide, widths.qkv);
        const int64_t width = call.dim / call.heads;
        Acc* const keys = t.keys[(l + 1) % 2];
        Acc* const values = t.values[(l + 1) % 2];
        for (int64_t i = 0; i < count; ++i) {
            const Acc* from = s.wide + i * widths.qkv;
            std::copy_n(from, call.dim, t.queries + at[i] * widths.token);
            for (int64_t head = 0; head < call.heads; ++head) {
                const int64_t place = (head * t.room + at[i]) * widths.head;
                copy_head(from + call.dim + head * width, width, keys + place);
                copy_head(from + 2 * call.dim + head * width, width, values + place);
            }
        }
    }

    void copy_head(const Acc* from, int64_t width, Acc* to) const {
        std::copy_n(from, width, to);
        std::fill(to + width, to + widths.head, Acc(0));
    }

    // For the backward pass.
    void keep(const Batch& b, int64_t l, int64_t token, const Acc* hidden) const {
        const Chunk& chunk = b.chunks[b.chunk_of[token]];
        const int64_t all = call.rows + call.chunks * call.clusters;
        const int64_t place = Span(call, chunk.place).begin + chunk.place * call.clusters + token - chunk.first;
        std::copy_n(hidden, call.dim, out.hidden + (l * all + place) * call.dim);
    }

    void share_out(const Batch& b, const int64_t* at, int64_t count, Scratch& s) const {
        shares.apply(s.unit, widths.token, count, s.wide, widths.logits);
        for (int64_t i = 0; i < count; ++i) {
            if (b.rows[at[i]] < 0) continue;  // a center, where there are no blocks
            Acc* logits = s.wide + i * widths.logits;
            const Acc top = *std::max_element(logits, logits + call.clusters);
            Acc total = 0;
            for (int64_t m = 0; m < call.clusters; m += LANES)
                store_work(logits + m, exponential(load_work(logits + m) - top));
            for (int64_t m = 0; m < call.clusters; ++m) total += logits[m];
            Acc* to = out.shares + b.rows[at[i]] * call.clusters;
            for (int64_t m = 0; m < call.clusters; ++m) to[m] = logits[m] / total;
        }
    }
};

}  // namespace fcn_kernels
