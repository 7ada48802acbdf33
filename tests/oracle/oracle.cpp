// Runs a model on command, and tells which experts it used.
//
// Uses nothing but the public API of libllama and ggml, so that it builds against any version and
// any kind of build. It serves tests in two roles:
//
//   driver   Commands on stdin, one answer per command on stdout. Nothing is decoded that was not
//            asked for, not even a warm-up, so a test knows every pass there is.
//   oracle   With --dump, an eval callback writes the ids that the router chose, read from the tensor
//            by ggml itself. Without --dump no callback is set, as in a program in the field.
//
// Usage: oracle -m MODEL [-t THREADS] [-c N_CTX] [-b N_BATCH] [-ub N_UBATCH] [--dump FILE]
//               [-ngl LAYERS] [-ot PATTERN=BUFFER_TYPE]... [--op-offload 0|1] [--rpc HOST:PORT]
//               [--count 0|1] [--nextn 0|1] [--dump-second FILE] [--dump-weights FILE] [--lora ADAPTER] [--ops 0|1]
//
// Devices are used only when asked for: -ngl, -ot and --op-offload mean what they mean to llama.cpp's
// programs, and --rpc adds the device of an RPC server. With --count, the eval callback only adds up
// how often each expert was chosen, as a tracer inside the program would. With --nextn, blocks that
// predict further tokens are loaded, too. With --lora, every context uses the adapter. With --ops, the
// eval callback counts nodes, and has none computed by itself.
//
// A copy (`fork`) shares the weights in memory with the process it is made of, and has one context of
// its own, with this eval callback:
//
//   none      as in a program in the field
//   topk      what --count 1 has: asks for `ffn_moe_topk-<layer>`, and counts its ids
//   mul-mat-id   the tracer inside the program that was first thought of for this (namespace in_process)
//
// Prints `ready <pid>` once the model and a first context are there. Commands:
//
//   decode SEQ tok...       append tokens to sequence SEQ in one call      ok <most likely next>
//   batch SEQ:tok...        append one token to each of several sequences  ok <most likely next>...
//   prompt SEQ N START      append tokens START, START+1, ... mod n_vocab  ok <most likely next>
//   generate SEQ N tok      N times: append tok, continue with the best    ok <id>...
//   stream SEQ N tok        the same, each id on a line when it is known   ok
//   thread-generate SEQ N tok   generate, in a thread that ends with it    ok <id>...
//   clear SEQ               forget a sequence                              ok
//   context                 make one more context and use it               ok <index>
//   nextn                   the same, one that runs the first NextN block  ok <index>
//   use INDEX               use another context                            ok
//   free INDEX              free a context                                 ok
//   reserve                 have the context make a new scheduler          ok
//   vocab                                                                  ok <n_vocab> <bos> <eos>
//   forced SEQ N START      append N tokens as prompt does, each in a call of its own   ok
//   counts                  how often the eval callback has counted        ok <layer>:<expert>:<n>...
//   fork SOCKET THREADS CALLBACK   make a copy, which connects to the Unix socket and takes commands
//                           there; both answer                             ok <pid of the copy>
//   tid                     thread id of the thread that decodes           ok <tid>
//   ops                     GET_ROWS nodes computed since the last `ops`   ok <n>
//   reused                  graphs that the context has used again         ok <n>
//   quit                                                                   ok
//
// A command that fails answers `error <reason>`, and the next one is read.
//
// Dump: a line `pass layer row id...` per row of a `ffn_moe_topk-<layer>` tensor, ids in router order,
// written out after each tensor. A pass is the evaluation of one micro-batch: it ends when the layer
// number does not increase. --dump-second writes the same of the second block of experts that layers of
// GroveMoE have: the ids that its last weight, `blk.<layer>.ffn_down_chexps`, is multiplied by.
//
// --dump-weights writes a line `pass layer block row weight...` per row of a `ffn_moe_weights-<layer>`
// tensor: each weight as the bits of its float, in hexadecimal; the block is 1 for a second block of
// experts. It needs a model of several layers with experts.

#include "ggml-backend.h"
#include "ggml.h"
#include "llama.h"

#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <filesystem>
#include <iostream>
#include <mutex>
#include <regex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

// A tracer inside the program, as it was first thought of for llama.cpp: an eval callback on every
// MUL_MAT_ID that copies the ids, and counts each of them under a mutex in hash maps. It is here to be
// measured against, by the costs that such a design has:
//
//   - the scheduler stops after each of the three multiplications of a layer;
//   - their ids are copied each time, with the rest of the argsort that lies between the rows;
//   - the layer is found by a regular expression, made anew each time;
//   - the mutex is taken, and two maps are searched, for every single id.
//
// It counts every id three times, once for each of gate, up and down.
//
// Mended, because it would count nothing or crash: the callback tells the scheduler which tensors it
// wants instead of all; the number of the layer is sought at the end of the tensor's name
// (`ffn_moe_gate-3`) and not after `blk.`; the copy is as large as what is copied, and rows are read at
// their distance.
namespace in_process {
namespace {

struct layer_stats {
    int layer = 0;
    uint64_t total = 0;
    std::unordered_map<int, uint64_t> activations;
};

class tracer {
  public:
    static tracer & instance() {
        static tracer the_only_one;
        return the_only_one;
    }

    void take(const ggml_tensor * t) {
        const ggml_tensor * ids = t->src[2];
        const int layer = layer_of(t->name);
        if (ids == nullptr || layer < 0) {
            return;
        }
        std::vector<uint8_t> bytes(ggml_nbytes(ids));
        ggml_backend_tensor_get(ids, bytes.data(), 0, bytes.size());
        for (int64_t row = 0; row < ids->ne[1]; row++) {
            for (int64_t rank = 0; rank < ids->ne[0]; rank++) {
                int32_t id;
                std::memcpy(&id, bytes.data() + row * ids->nb[1] + rank * ids->nb[0], sizeof(id));
                record(layer, id);
            }
        }
    }

    // Calls `f(layer, expert, count)` for all.
    template <typename F> void each(F f) {
        std::lock_guard<std::mutex> lock(mutex);
        for (const auto & [layer, stats] : layers) {
            for (const auto & [id, n] : stats.activations) {
                f(layer, id, n);
            }
        }
    }

  private:
    void record(int layer, int id) {
        std::lock_guard<std::mutex> lock(mutex);
        layer_stats & stats = layers[layer];
        stats.layer = layer;
        stats.activations[id]++;
        stats.total++;
    }

    static int layer_of(const char * name) {
        const std::string text(name);
        const std::regex pattern(R"(ffn_moe_\w+-(\d+)$)");
        std::smatch match;
        return std::regex_search(text, match, pattern) ? std::stoi(match[1].str()) : -1;
    }

    std::mutex mutex;
    std::unordered_map<int, layer_stats> layers;
};

// ggml_backend_sched_eval_callback.
bool on_eval(ggml_tensor * t, bool ask, void *) {
    if (t->op != GGML_OP_MUL_MAT_ID) {
        return false;
    }
    if (!ask) {
        tracer::instance().take(t);
    }
    return true;
}

} // namespace
} // namespace in_process

namespace {

constexpr uint32_t N_SEQ_MAX = 8;

struct Options {
    std::string model;
    std::string dump;
    std::string dump_second;
    std::string dump_weights;
    std::string lora;
    int threads = 1;
    int n_ctx = 0;
    int n_batch = 0;
    int n_ubatch = 0;
    int n_gpu_layers = 0;
    bool op_offload = true;
    bool count = false;
    bool in_process = false;
    bool ops = false;
    bool nextn = false;
    std::string rpc;
    std::vector<std::pair<std::string, std::string>> overrides;
};

Options parse_options(int argc, char ** argv) {
    Options options;
    for (int i = 1; i < argc; i += 2) {
        const std::string flag = argv[i];
        if (i + 1 == argc) {
            throw std::runtime_error("no value for " + flag);
        }
        const char * value = argv[i + 1];
        if (flag == "-m") {
            options.model = value;
        } else if (flag == "--dump") {
            options.dump = value;
        } else if (flag == "--dump-second") {
            options.dump_second = value;
        } else if (flag == "--dump-weights") {
            options.dump_weights = value;
        } else if (flag == "--lora") {
            options.lora = value;
        } else if (flag == "-t") {
            options.threads = std::stoi(value);
        } else if (flag == "-c") {
            options.n_ctx = std::stoi(value);
        } else if (flag == "-b") {
            options.n_batch = std::stoi(value);
        } else if (flag == "-ub") {
            options.n_ubatch = std::stoi(value);
        } else if (flag == "-ngl") {
            options.n_gpu_layers = std::stoi(value);
        } else if (flag == "--op-offload") {
            options.op_offload = std::stoi(value) != 0;
        } else if (flag == "--count") {
            options.count = std::stoi(value) != 0;
        } else if (flag == "--ops") {
            options.ops = std::stoi(value) != 0;
        } else if (flag == "--nextn") {
            options.nextn = std::stoi(value) != 0;
        } else if (flag == "--rpc") {
            options.rpc = value;
        } else if (flag == "-ot") {
            const char * equals = std::strrchr(value, '=');
            if (equals == nullptr) {
                throw std::runtime_error("expected PATTERN=BUFFER_TYPE");
            }
            options.overrides.emplace_back(std::string(value, equals), equals + 1);
        } else {
            throw std::runtime_error("unknown option " + flag);
        }
    }
    if (options.model.empty()) {
        throw std::runtime_error("no model (-m)");
    }
    return options;
}

struct Dump {
    FILE * out = nullptr;
    FILE * second = nullptr;
    FILE * weights = nullptr;
    int64_t pass = -1;
    int last_layer = -1;
    int64_t weights_pass = -1;
    int last_weights_layer = -1;
    std::vector<uint8_t> bytes;
    std::mutex mutex;
    std::unordered_map<int, std::unordered_map<int32_t, uint64_t>> counts;
    uint64_t get_rows = 0;
};

void write_rows(FILE * out, Dump & dump, int layer, const ggml_tensor * t) {
    // The tensor can be a view of all experts sorted, so rows are further apart than k ids.
    dump.bytes.resize(ggml_nbytes(t));
    ggml_backend_tensor_get(t, dump.bytes.data(), 0, dump.bytes.size());
    for (int64_t row = 0; row < t->ne[1]; row++) {
        std::fprintf(out, "%lld %d %lld", (long long) dump.pass, layer, (long long) row);
        for (int64_t rank = 0; rank < t->ne[0]; rank++) {
            int32_t id;
            std::memcpy(&id, dump.bytes.data() + row * t->nb[1] + rank * t->nb[0], sizeof(id));
            std::fprintf(out, " %d", id);
        }
        std::fputc('\n', out);
    }
    std::fflush(out);
}

void write_weights(Dump & dump, int layer, const ggml_tensor * t) {
    const bool second = layer == dump.last_weights_layer;
    if (dump.weights_pass < 0 || layer < dump.last_weights_layer) {
        dump.weights_pass++;
    }
    dump.last_weights_layer = layer;
    dump.bytes.resize(ggml_nbytes(t));
    ggml_backend_tensor_get(t, dump.bytes.data(), 0, dump.bytes.size());
    for (int64_t row = 0; row < t->ne[2]; row++) {
        std::fprintf(dump.weights, "%lld %d %d %lld", (long long) dump.weights_pass, layer, second, (long long) row);
        for (int64_t rank = 0; rank < t->ne[1]; rank++) {
            uint32_t bits;
            std::memcpy(&bits, dump.bytes.data() + row * t->nb[2] + rank * t->nb[1], sizeof(bits));
            std::fprintf(dump.weights, " %08x", bits);
        }
        std::fputc('\n', dump.weights);
    }
    std::fflush(dump.weights);
}

// Layer of which the second block of experts ends with this tensor; else -1.
int second_block(const ggml_tensor * t) {
    int layer;
    int length = 0;
    const bool is_it = t->op == GGML_OP_MUL_MAT_ID &&
                       std::sscanf(t->src[0]->name, "blk.%d.ffn_down_chexps.weight%n", &layer, &length) == 1 && length > 0;
    return is_it ? layer : -1;
}

// ggml_backend_sched_eval_callback: asked before (`ask`) and called after a tensor is computed.
bool on_tensor(ggml_tensor * t, bool ask, void * user_data) {
    static const std::string prefix = "ffn_moe_topk-";
    static const std::string weights_prefix = "ffn_moe_weights-";
    Dump & dump = *static_cast<Dump *>(user_data);
    if (dump.weights != nullptr && t->op == GGML_OP_GET_ROWS &&
        std::strncmp(t->name, weights_prefix.c_str(), weights_prefix.size()) == 0) {
        if (!ask) {
            write_weights(dump, std::atoi(t->name + weights_prefix.size()), t);
        }
        return true;
    }
    if (dump.out == nullptr && dump.weights != nullptr) {
        return false;
    }
    if (dump.second != nullptr && second_block(t) >= 0) {
        if (!ask) {
            write_rows(dump.second, dump, second_block(t), t->src[2]);
        }
        return true;
    }
    if (std::strncmp(t->name, prefix.c_str(), prefix.size()) != 0) {
        return false;
    }
    if (ask) {
        return true;
    }
    const int layer = std::atoi(t->name + prefix.size());
    if (dump.second != nullptr && layer == dump.last_layer) {
        // The second block makes the same choice once more, and goes on with it.
        return true;
    }
    if (dump.pass < 0 || layer <= dump.last_layer) {
        dump.pass++;
    }
    dump.last_layer = layer;

    if (dump.out == nullptr) {
        dump.bytes.resize(ggml_nbytes(t));
        ggml_backend_tensor_get(t, dump.bytes.data(), 0, dump.bytes.size());
        std::lock_guard<std::mutex> lock(dump.mutex);
        auto & experts = dump.counts[layer];
        for (int64_t row = 0; row < t->ne[1]; row++) {
            for (int64_t rank = 0; rank < t->ne[0]; rank++) {
                int32_t id;
                std::memcpy(&id, dump.bytes.data() + row * t->nb[1] + rank * t->nb[0], sizeof(id));
                experts[id]++;
            }
        }
        return true;
    }
    write_rows(dump.out, dump, layer, t);
    return true;
}

// Answers go where commands come from from now on: to the program that listens at the socket.
void serve(const std::string & socket_path) {
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    if (socket_path.size() >= sizeof(address.sun_path)) {
        throw std::runtime_error("the path of the socket is too long");
    }
    std::strcpy(address.sun_path, socket_path.c_str());
    const int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (fd < 0 || connect(fd, (const sockaddr *) &address, sizeof(address)) != 0) {
        throw std::runtime_error("cannot connect to " + socket_path);
    }
    dup2(fd, STDIN_FILENO);
    dup2(fd, STDOUT_FILENO);
    close(fd);
}

// The same, for --ops. It is asked about every node once. ggml passes over those without an element, and
// those of inputs that the pass does not use (ggml_build_forward_select).
bool on_question(ggml_tensor * t, bool ask, void * user_data) {
    const bool is_computed = (t->flags & GGML_TENSOR_FLAG_COMPUTE) != 0 && !ggml_is_empty(t);
    if (ask && t->op == GGML_OP_GET_ROWS && is_computed) {
        static_cast<Dump *>(user_data)->get_rows++;
    }
    return false;
}

void add_rpc_server(const std::string & endpoint) {
    using AddServer = ggml_backend_reg_t (*)(const char * endpoint);
    ggml_backend_reg_t rpc = ggml_backend_reg_by_name("RPC");
    const auto add_server =
        rpc == nullptr ? nullptr : (AddServer) ggml_backend_reg_get_proc_address(rpc, "ggml_backend_rpc_add_server");
    if (add_server == nullptr) {
        throw std::runtime_error("built without RPC");
    }
    ggml_backend_register(add_server(endpoint.c_str()));
}

ggml_backend_buffer_type_t buffer_type(const std::string & name) {
    for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
        ggml_backend_buffer_type_t type = ggml_backend_dev_buffer_type(ggml_backend_dev_get(i));
        if (type != nullptr && name == ggml_backend_buft_name(type)) {
            return type;
        }
    }
    throw std::runtime_error("no buffer type " + name);
}

// What builds without NextN blocks do not have.
template <typename P> auto load_nextn(P & params, int) -> decltype(params.load_mtp, void()) {
    params.load_mtp = true;
}

template <typename P> void load_nextn(P &, long) {
    throw std::runtime_error("built without NextN blocks");
}

template <typename P> auto run_nextn(P & params, int) -> decltype(params.ctx_type, void()) {
    params.ctx_type = decltype(params.ctx_type)(1); // LLAMA_CONTEXT_TYPE_MTP
}

template <typename P> void run_nextn(P &, long) {
    throw std::runtime_error("built without NextN blocks");
}

struct Entry {
    llama_seq_id seq;
    llama_token token;
    bool output;
};

struct Context {
    llama_context * ctx;
    bool nextn;
};

class Driver {
  public:
    explicit Driver(const Options & options) : options(options) {
        dump.out = open(options.dump);
        dump.second = open(options.dump_second);
        dump.weights = open(options.dump_weights);
        if (!options.rpc.empty()) {
            add_rpc_server(options.rpc);
        }
        llama_model_params params = llama_model_default_params();
        params.n_gpu_layers = options.n_gpu_layers;
        std::vector<llama_model_tensor_buft_override> overrides;
        for (const auto & [pattern, type] : options.overrides) {
            overrides.push_back({ pattern.c_str(), buffer_type(type) });
        }
        overrides.push_back({ nullptr, nullptr });
        params.tensor_buft_overrides = overrides.data();
        if (options.nextn) {
            load_nextn(params, 0);
        }
        model = llama_model_load_from_file(options.model.c_str(), params);
        if (model == nullptr) {
            throw std::runtime_error("cannot load " + options.model);
        }
        vocab = llama_model_get_vocab(model);
        n_vocab = llama_vocab_n_tokens(vocab);
        if (!options.lora.empty()) {
            lora = llama_adapter_lora_init(model, options.lora.c_str());
            if (lora == nullptr) {
                throw std::runtime_error("cannot load " + options.lora);
            }
        }
        add_context(false);
    }

    ~Driver() {
        for (const Context & c : contexts) {
            llama_free(c.ctx);
        }
        llama_model_free(model);
        for (FILE * file : { dump.out, dump.second, dump.weights }) {
            if (file != nullptr) {
                std::fclose(file);
            }
        }
    }

    Driver(const Driver &) = delete;
    Driver & operator=(const Driver &) = delete;

    // Runs one command and returns what follows `ok`.
    std::string run(const std::string & line) {
        std::istringstream in(line);
        std::string command;
        in >> command;
        std::ostringstream out;
        if (command == "decode") {
            const int seq = number(in);
            std::vector<Entry> entries;
            while (more(in)) {
                entries.push_back({ seq, number(in), false });
            }
            out << ' ' << decode_last(entries);
        } else if (command == "batch") {
            std::vector<Entry> entries;
            while (more(in)) {
                const int seq = number(in);
                if (in.get() != ':') {
                    throw std::runtime_error("expected SEQ:tok");
                }
                entries.push_back({ seq, number(in), true });
            }
            decode(entries);
            for (size_t i = 0; i < entries.size(); i++) {
                out << ' ' << best(i);
            }
        } else if (command == "prompt") {
            const int seq = number(in);
            const int n = number(in);
            const int64_t start = number(in);
            std::vector<Entry> entries;
            for (int i = 0; i < n; i++) {
                entries.push_back({ seq, (llama_token) ((start + i) % n_vocab), false });
            }
            out << ' ' << decode_last(entries);
        } else if (command == "generate") {
            generate(in, [&](llama_token id) { out << ' ' << id; });
        } else if (command == "thread-generate") {
            std::exception_ptr failure;
            std::thread([&] {
                try {
                    generate(in, [&](llama_token id) { out << ' ' << id; });
                } catch (...) {
                    failure = std::current_exception();
                }
            }).join();
            if (failure) {
                std::rethrow_exception(failure);
            }
        } else if (command == "stream") {
            generate(in, [](llama_token id) { std::cout << id << std::endl; });
        } else if (command == "clear") {
            llama_memory_seq_rm(llama_get_memory(context()), sequence(number(in)), -1, -1);
        } else if (command == "context" || command == "nextn") {
            add_context(command == "nextn");
            out << ' ' << current;
        } else if (command == "use") {
            current = index(in);
        } else if (command == "free") {
            const size_t i = index(in);
            llama_free(contexts[i].ctx);
            contexts[i].ctx = nullptr;
        } else if (command == "reserve") {
            // A control vector of zeros changes no value, and the shape of every graph.
            const int          n_embd = llama_model_n_embd(model);
            const int          layers = llama_model_n_layer(model);
            std::vector<float> zeros(static_cast<size_t>(n_embd) * (layers - 1));
            if (llama_set_adapter_cvec(context(), zeros.data(), zeros.size(), n_embd, 1, layers - 1)) {
                throw std::runtime_error("no control vector");
            }
        } else if (command == "vocab") {
            out << ' ' << n_vocab << ' ' << llama_vocab_bos(vocab) << ' ' << llama_vocab_eos(vocab);
        } else if (command == "forced") {
            const int seq = number(in);
            const int n = number(in);
            const int64_t start = number(in);
            for (int i = 0; i < n; i++) {
                decode({ { seq, (llama_token) ((start + i) % n_vocab), true } });
            }
        } else if (command == "counts") {
            for (const auto & [layer, experts] : dump.counts) {
                for (const auto & [id, n] : experts) {
                    out << ' ' << layer << ':' << id << ':' << n;
                }
            }
            in_process::tracer::instance().each([&](int layer, int id, uint64_t n) {
                out << ' ' << layer << ':' << id << ':' << n;
            });
        } else if (command == "fork") {
            std::string socket_path;
            std::string callback;
            in >> socket_path;
            const int threads = number(in);
            in >> callback;
            out << ' ' << make_copy(socket_path, threads, callback);
        } else if (command == "tid") {
            out << ' ' << syscall(SYS_gettid);
        } else if (command == "ops") {
            out << ' ' << std::exchange(dump.get_rows, 0);
        } else if (command == "reused") {
            out << ' ' << llama_perf_context(context()).n_reused;
        } else {
            throw std::runtime_error("unknown command");
        }
        return out.str();
    }

  private:
    // A file to write to; none without a name.
    static FILE * open(const std::string & path) {
        FILE * file = path.empty() ? nullptr : std::fopen(path.c_str(), "w");
        if (file == nullptr && !path.empty()) {
            throw std::runtime_error("cannot write " + path);
        }
        return file;
    }

    static bool more(std::istringstream & in) { return !(in >> std::ws).eof(); }

    static int number(std::istringstream & in) {
        int n;
        if (!(in >> n)) {
            throw std::runtime_error("expected a number");
        }
        return n;
    }

    static llama_seq_id sequence(int seq) {
        if (seq < 0 || seq >= (int) N_SEQ_MAX) {
            throw std::runtime_error("no such sequence");
        }
        return seq;
    }

    size_t index(std::istringstream & in) {
        const int i = number(in);
        if (i < 0 || i >= (int) contexts.size() || contexts[i].ctx == nullptr) {
            throw std::runtime_error("no such context");
        }
        return i;
    }

    llama_context * context() {
        if (contexts[current].ctx == nullptr) {
            throw std::runtime_error("the context in use was freed");
        }
        return contexts[current].ctx;
    }

    // Pid of the copy, in both processes.
    pid_t make_copy(const std::string & socket_path, int threads, const std::string & callback) {
        const auto tasks = std::filesystem::directory_iterator("/proc/self/task");
        if (std::distance(begin(tasks), end(tasks)) != 1) {
            // Other threads would not be in the copy, and OpenMP would wait for them.
            throw std::runtime_error("cannot make a copy after something was decoded");
        }
        if (callback != "none" && callback != "topk" && callback != "mul-mat-id") {
            throw std::runtime_error("no such callback");
        }
        // Nobody waits for copies.
        std::signal(SIGCHLD, SIG_IGN);
        const pid_t pid = fork();
        if (pid < 0) {
            throw std::runtime_error("cannot fork");
        }
        if (pid > 0) {
            return pid;
        }
        try {
            serve(socket_path);
        } catch (const std::exception & e) {
            std::fprintf(stderr, "oracle: %s\n", e.what());
            _exit(1);
        }
        options.threads = threads;
        options.count = callback == "topk";
        options.in_process = callback == "mul-mat-id";
        for (Context & c : contexts) {
            llama_free(c.ctx);
        }
        contexts.clear();
        add_context(false);
        return getpid();
    }

    void add_context(bool nextn) {
        llama_context_params params = llama_context_default_params();
        if (nextn) {
            run_nextn(params, 0);
        }
        params.n_seq_max = N_SEQ_MAX;
        // One cache for all sequences: each may use all of it, and they share micro-batches.
        params.kv_unified = true;
        params.op_offload = options.op_offload;
        params.n_threads = options.threads;
        params.n_threads_batch = options.threads;
        if (options.n_ctx > 0) {
            params.n_ctx = options.n_ctx;
        }
        if (options.n_batch > 0) {
            params.n_batch = options.n_batch;
        }
        if (options.n_ubatch > 0) {
            params.n_ubatch = options.n_ubatch;
        }
        if (dump.out != nullptr || dump.weights != nullptr || options.count) {
            params.cb_eval = on_tensor;
            params.cb_eval_user_data = &dump;
        }
        if (options.in_process) {
            params.cb_eval = in_process::on_eval;
        }
        if (options.ops) {
            params.cb_eval = on_question;
            params.cb_eval_user_data = &dump;
        }
        llama_context * c = llama_init_from_model(model, params);
        if (c == nullptr) {
            throw std::runtime_error("cannot make a context");
        }
        if (lora != nullptr) {
            float scale = 1.0f;
            if (llama_set_adapters_lora(c, &lora, 1, &scale) != 0) {
                throw std::runtime_error("cannot use the adapter");
            }
        }
        contexts.push_back({ c, nextn });
        current = contexts.size() - 1;
    }

    void decode(const std::vector<Entry> & entries) {
        llama_context * ctx = context();
        // llama_decode aborts the process for a batch that is too large.
        if (entries.empty() || entries.size() > llama_n_batch(ctx)) {
            throw std::runtime_error("a batch has 1 to " + std::to_string(llama_n_batch(ctx)) + " tokens");
        }
        std::vector<llama_pos> next(N_SEQ_MAX);
        for (uint32_t seq = 0; seq < N_SEQ_MAX; seq++) {
            next[seq] = llama_memory_seq_pos_max(llama_get_memory(ctx), seq) + 1;
        }
        for (const Entry & entry : entries) {
            sequence(entry.seq);
            if (entry.token < 0 || entry.token >= n_vocab) {
                throw std::runtime_error("no such token");
            }
        }
        llama_batch batch = llama_batch_init(entries.size(), 0, 1);
        for (const Entry & entry : entries) {
            const int i = batch.n_tokens++;
            batch.token[i] = entry.token;
            batch.pos[i] = next[entry.seq]++;
            batch.n_seq_id[i] = 1;
            batch.seq_id[i][0] = entry.seq;
            batch.logits[i] = entry.output;
        }
        std::vector<float> states;
        if (contexts[current].nextn) {
            states = states_before(entries);
            batch.embd = states.data();
        }
        const int status = llama_decode(ctx, batch);
        batch.embd = nullptr;
        llama_batch_free(batch);
        if (status != 0) {
            throw std::runtime_error("llama_decode returned " + std::to_string(status));
        }
    }

    // For each token what stands for the model's state before it, from which a NextN block goes on. It
    // only has to depend on the token.
    std::vector<float> states_before(const std::vector<Entry> & entries) const {
        const int n_embd = llama_model_n_embd(model);
        std::vector<float> states;
        for (const Entry & entry : entries) {
            for (int i = 0; i < n_embd; i++) {
                states.push_back(std::sin((entry.token + 1.0f) * (i + 1)));
            }
        }
        return states;
    }

    llama_token decode_last(std::vector<Entry> & entries) {
        if (!entries.empty()) {
            entries.back().output = true;
        }
        decode(entries);
        return best(entries.size() - 1);
    }

    // The most likely token after the i-th of the last batch.
    llama_token best(int i) {
        const float * logits = llama_get_logits_ith(context(), i);
        return std::max_element(logits, logits + n_vocab) - logits;
    }

    template <typename F> void generate(std::istringstream & in, F emit) {
        const int seq = number(in);
        const int n = number(in);
        llama_token token = number(in);
        for (int i = 0; i < n; i++) {
            decode({ { seq, token, true } });
            token = best(0);
            emit(token);
        }
    }

    Options options;
    Dump dump;
    llama_model * model = nullptr;
    llama_adapter_lora * lora = nullptr;
    const llama_vocab * vocab = nullptr;
    int n_vocab = 0;
    std::vector<Context> contexts;
    size_t current = 0;
};

// Keeps what llama.cpp says about a failure, and drops the hundreds of lines about success.
void log_problems(ggml_log_level level, const char * text, void *) {
    static bool shown = false;
    if (level != GGML_LOG_LEVEL_CONT) {
        shown = level == GGML_LOG_LEVEL_WARN || level == GGML_LOG_LEVEL_ERROR;
    }
    if (shown) {
        std::fputs(text, stderr);
    }
}

} // namespace

int main(int argc, char ** argv) {
    try {
        const Options options = parse_options(argc, argv);
        llama_log_set(log_problems, nullptr);
        ggml_backend_load_all();
        llama_backend_init();
        Driver driver(options);
        std::cout << "ready " << getpid() << std::endl;
        std::string line;
        while (std::getline(std::cin, line)) {
            if (line == "quit") {
                std::cout << "ok" << std::endl;
                break;
            }
            try {
                const std::string answer = driver.run(line);
                std::cout << "ok" << answer << std::endl;
            } catch (const std::exception & e) {
                std::cout << "error " << e.what() << std::endl;
            }
        }
        return 0;
    } catch (const std::exception & e) {
        std::fprintf(stderr, "oracle: %s\n", e.what());
        return 1;
    }
}
